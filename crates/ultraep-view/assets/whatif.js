// What if: the panel by which a microbatch is planned with other settings, and the difference.
import { card, count, html, percent, ratio, table, time } from "./dom.js";

const FIELDS = [
  ["policy", "policy"], ["slots", "slots on a rank"], ["domain", "ranks in a domain"], ["beta", "β, tolerated"],
  ["min_quota", "least quota, tokens or auto"], ["window", "window of history"], ["hardware", "hardware"],
  ["hidden", "hidden size"], ["width", "expert width"],
];

// `asked` are the settings in force, `apply(query)` takes those that were changed, null to forget them.
export function whatIfPanel({ settings, known, apply, error, base, other }) {
  const inputs = {};
  const field = ([key, name]) => {
    const value = String(settings[key]);
    if (key === "policy" || key === "hardware") {
      const names = key === "policy" ? known.policies.map((p) => p.name) : known.hardware;
      const options = names.includes(value) ? names : [value, ...names];
      inputs[key] = html("select", { id: "what-if-" + key, name: key }, options.map((option) =>
        html("option", { value: option, selected: option === value }, option)));
    } else {
      const type = key === "beta" || key === "min_quota" ? "text" : "number";
      inputs[key] = html("input", { id: "what-if-" + key, name: key, type, value, min: key === "slots" ? 0 : 1, inputmode: type === "number" ? "numeric" : null });
    }
    return html("label", null, name, inputs[key]);
  };
  const submit = (event) => {
    event.preventDefault();
    apply(Object.fromEntries(FIELDS.map(([key]) => [key, inputs[key].value.trim()])));
  };
  const form = html("form", { class: "what-if", submit }, FIELDS.map(field),
    html("div", { class: "buttons" }, html("button", { class: "primary", type: "submit", id: "plan-again" }, "Plan again"),
      other ? html("button", { type: "button", id: "forget", click: () => apply(null) }, "Forget") : null));
  return card("What if", true, form,
    error ? html("p", { class: "error", role: "alert" }, error) : null,
    other ? difference(base, other) : html("p", { class: "faint" }, "Plan this microbatch with other settings and see the difference."));
}

function difference(base, other) {
  const [was, now] = [base.plan, other.plan];
  const rows = [
    ["imbalance after", was.imbalance_after, now.imbalance_after, ratio],
    ["fullest rank, tokens", was.most_after, now.most_after, count],
    ["replicas", was.replicas, now.replicas, count],
    ["tokens on another rank", was.remote_share, now.remote_share, percent],
    ["weight sync", was.transfers.sync_ns, now.transfers.sync_ns, time],
    ["all-to-all", was.times.after.all_to_all_ns, now.times.after.all_to_all_ns, time],
    ["experts", was.times.after.experts_ns, now.times.after.experts_ns, time],
    ["critical path", was.times.after.total_ns, now.times.after.total_ns, time],
  ];
  // Less is better in every row; the sign says it too, for those who do not see the colour.
  const change = (a, b) => {
    if (a === b) return "same";
    const part = a === 0 ? null : (b - a) / a;
    const text = part === null ? (b > a ? "more" : "less") : `${b > a ? "+" : "−"}${percent(Math.abs(part))}`;
    return html("span", { class: b < a ? "better" : "worse" }, text);
  };
  const words = now.stop ? html("p", { class: "faint" }, `${now.policy}: ${now.stop}${now.lower_bound ? `; no plan with this least quota puts less than ${count(now.lower_bound)} tokens on the fullest rank` : ""}.`) : null;
  return html("div", { id: "difference" },
    table(["", base.is_recorded ? `recorded: ${was.policy}` : was.policy, `what if: ${now.policy}`, "change"],
      rows.map(([name, a, b, shown]) => [name, shown(a), shown(b), change(a, b)])), words);
}
