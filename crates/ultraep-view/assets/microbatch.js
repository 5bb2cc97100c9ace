// One microbatch of a layer: experts on ranks before and after, copies, flow of tokens, transfers, predicted times.
import { card, count, figures, html, ratio, table, time } from "./dom.js";
import { amountScale } from "./scale.js";
import { heatmap } from "./heatmap.js";
import { barsLegend, instancesOf, mastersOf, rankBars, remoteWords, timesTable } from "./bars.js";
import { transferTrees } from "./trees.js";

// Pictures of `data`, and beside them of `asked` where the microbatch was planned with other settings. `splitOf(expert)`
// promises the split of one expert; null where nobody can be asked.
export function microbatchCards(data, asked, splitOf) {
  const plans = [["after balancing", data.plan, "after"]];
  if (asked) plans.push(["what if", asked.plan, "what-if"]);
  const mean = data.total_tokens / data.ranks;
  const most = Math.max(...data.plan.rank_before, ...plans.flatMap(([, plan]) => plan.rank_after), 1);
  const shared = { expert: null, redraw: [] };
  const shown = asked ? asked.plan : data.plan;
  const which = asked ? " (what if)" : "";
  return [
    card("Experts on ranks", true,
      barsLegend(plans.map(([name, , kind]) => [`replicas, ${name}`, kind])),
      rankBars({ title: "As routed", ranks: mastersOf(data), most, mean, kind: "before", hint: "tokens of each rank; point at a segment for its expert" }, shared),
      plans.map(([name, plan, kind]) =>
        rankBars({ title: `${name === "what if" ? "What if" : "After balancing"}: ${plan.policy}`, ranks: instancesOf(plan), most, mean, kind }, shared))),
    card("Predicted times of the forward", false, timesCard(data, asked)),
    card(`Flow of tokens${which}`, false, flowCard(shown, data, splitOf)),
    card(`Replicas${which}`, false, copiesTable(shown)),
    card(`Transfers of weights${which}`, false, transferWords(shown), transferTrees(shown.transfers)),
  ];
}

export function microbatchFigures(data) {
  const plan = data.plan;
  return figures([
    ["imbalance as routed", ratio(plan.imbalance_before), "before"],
    [`under ${plan.policy}`, ratio(plan.imbalance_after), "after"],
    ["fullest rank as routed", count(plan.most_before), "before"],
    ["fullest rank after", count(plan.most_after), "after"],
    ["tokens", count(data.total_tokens)],
    ["replicas", String(plan.replicas)],
    ["tokens on another rank", remoteWords(plan)],
  ]);
}

function timesCard(data, asked) {
  const plans = [
    { name: "as routed", parts: data.plan.times.before, kind: "before" },
    { name: data.plan.policy, parts: data.plan.times.after, kind: "after" },
  ];
  if (asked) plans.push({ name: "what if", parts: asked.plan.times.after, kind: "what-if" });
  const settings = (asked || data).settings;
  return [
    timesTable(plans),
    html("p", { class: "faint" }, `${(asked || data).plan.times.hardware}, hidden ${settings.hidden}, expert width ${settings.width}. A prediction, not a measurement. The critical path is plan, then the longer of reroute and weight sync, then all-to-all and experts.`),
    html("details", null, html("summary", null, "Where the numbers of the hardware are from"),
      html("ul", { class: "notes" }, settings.hardware_sources.map((source) => html("li", { class: "path" }, source)))),
  ];
}

// The flow of all experts, or the split of one.
function flowCard(plan, data, splitOf) {
  const all = flow(plan, data.ranks);
  if (!splitOf) return all;
  const box = html("div", null, all);
  const choose = html("select", { id: "split-expert", change: async () => {
    if (choose.value === "all") return box.replaceChildren(all);
    try {
      box.replaceChildren(split(await splitOf(Number(choose.value))));
    } catch (error) {
      box.replaceChildren(html("p", { class: "error", role: "alert" }, error.message));
    }
  } }, html("option", { value: "all" }, "all experts"),
  data.expert_loads.map((load, expert) => [load, expert]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map(([load, expert]) =>
    html("option", { value: String(expert) }, `expert ${expert}: ${count(load)} tokens`)));
  return html("div", null, html("p", null, html("label", null, "Tokens for ", choose)), box);
}

function split(of) {
  const rows = Math.ceil(of.ranks / of.ranks_per_row);
  const columns = of.instances.length;
  const per = of.ranks_per_row;
  const row = (r) => (per > 1 ? `${r * per}+` : String(r));
  const column = (c) => `${of.instances[c][0]}${of.instances[c][2] ? "" : "*"}`;
  return heatmap({
    title: `Split of expert ${of.expert}`, rows, columns, values: of.tokens, square: true,
    scale: amountScale(Math.max(...of.tokens, 1), "tokens"), rowName: row, columnName: column,
    summary: `${columns} instances; ` + of.instances.map(([rank, tokens]) => `rank ${rank}: ${count(tokens)}`).join(", "),
    hint: "rows: source ranks; columns: ranks of the instances, * the master's",
    describe: (r, c) => `from rank ${row(r)} to the ${of.instances[c][2] ? "replica" : "master"} on rank ${of.instances[c][0]}: ${count(of.tokens[r * columns + c])} of ${count(of.instances[c][1])} tokens`,
  });
}

function flow(plan, ranks) {
  const per = plan.flow.ranks_per_group;
  const groups = Math.ceil(ranks / per);
  const tokens = plan.flow.tokens;
  const name = (group) => (per > 1 ? `${group * per}+` : String(group));
  const home = tokens.filter((_, index) => index % (groups + 1) === 0).reduce((sum, n) => sum + n, 0);
  const all = tokens.reduce((sum, n) => sum + n, 0);
  return heatmap({
    title: "Flow of tokens", rows: groups, columns: groups, values: tokens, square: true,
    scale: amountScale(Math.max(...tokens, 1), "tokens"), rowName: name, columnName: name,
    summary: `${count(home)} of ${count(all)} tokens stay on their source rank`,
    hint: "rows: source ranks; columns: ranks that process",
    describe: (r, c) => `from rank ${name(r)} to rank ${name(c)}: ${count(tokens[r * groups + c])} tokens`,
  });
}

function copiesTable(plan) {
  if (plan.copies.length === 0) return html("p", { class: "faint" }, "None.");
  const rows = plan.copies.slice(0, 200).map(([expert, from, to, tokens]) => [`expert ${expert}`, `${from} → ${to}`, count(tokens)]);
  const left = plan.copies.length + plan.copies_left_out - rows.length;
  return [
    html("div", { class: "tall" }, table(["expert", "home → rank", "tokens"], rows)),
    left > 0 ? html("p", { class: "faint" }, `and ${left} more`) : null,
  ];
}

function transferWords(plan) {
  const t = plan.transfers;
  if (t.tasks.length === 0) return null;
  const relays = t.relayed_experts === 0 ? "home ranks send everything" : `relays forward ${t.relayed_experts} ${t.relayed_experts === 1 ? "expert" : "experts"}, up to ${t.depth} hops`;
  return html("p", null, `${relays}: ${time(t.sync_ns)} by the model of chunks, ${time(t.direct_sync_ns)} if home ranks sent everything; ` +
    `the busiest rank sends ${t.fanout} ${t.fanout === 1 ? "time" : "times"}. The dark circle is the home rank.`, t.left_out > 0 ? ` ${t.left_out} sends are not drawn.` : "");
}
