// Experts on ranks as stacked bars, and where the time of a layer goes.
import { colour, count, html, penOn, percent, picture, short, svg, table, ticks, time } from "./dom.js";

const LEFT = 46;
const TOP = 10;
const BOTTOM = 20;

// Segments of a rank, masters first: { expert, tokens, replica }.
export function mastersOf(microbatch) {
  let expert = 0;
  return microbatch.masters.map((masters) => {
    const segments = [];
    for (let i = 0; i < masters; i++, expert++) {
      segments.push({ expert, tokens: microbatch.expert_loads[expert], replica: false });
    }
    return segments;
  });
}

export function instancesOf(plan) {
  return plan.instances.map((flat) => {
    const segments = [];
    for (let i = 0; i < flat.length; i += 4) segments.push({ expert: flat[i], tokens: flat[i + 2], replica: flat[i + 3] === 1 });
    return segments.sort((a, b) => a.replica - b.replica || a.expert - b.expert);
  });
}

// `bars`: title, ranks (segments of each), most (of the common scale), mean, kind of its replicas. `shared` is one cursor for
// several pictures of the same microbatch: { expert, redraw: [] }.
export function rankBars(bars, shared) {
  const readout = html("div", { class: "readout", "aria-live": "polite" }, bars.hint || "\u00a0");
  let cursor = -1;
  const box = picture((box, width) => {
    const height = 210;
    const inner = { w: width - LEFT - 8, h: height - TOP - BOTTOM };
    const step = inner.w / bars.ranks.length;
    const gap = step > 5 ? Math.min(step * 0.15, 6) : 0;
    const tall = (tokens) => (inner.h * tokens) / Math.max(bars.most, 1);
    const base = TOP + inner.h;
    const canvas = html("canvas", { tabindex: 0, role: "img", "aria-label": summary(bars) });
    const { pen, clear } = penOn(canvas, width, height);
    const paint = () => {
      clear();
      axes(pen, bars, { width, tall, base, step, height });
      bars.ranks.forEach((segments, rank) => {
        const x = LEFT + rank * step + gap / 2;
        const w = Math.max(step - gap, 0.8);
        let top = base;
        segments.forEach((segment, place) => {
          const h = tall(segment.tokens);
          top -= h;
          paintSegment(pen, segment, place, { x, top, w, h }, bars.kind, shared.expert);
        });
        if (rank === cursor) {
          pen.strokeStyle = colour("ink");
          pen.lineWidth = 1.5;
          pen.strokeRect(x - 1, top - 2, w + 2, base - top + 3);
        }
      });
      meanLine(pen, bars, { width, y: base - tall(bars.mean) });
    };
    const move = (rank, expert) => {
      cursor = Math.min(Math.max(rank, 0), bars.ranks.length - 1);
      readout.textContent = words(bars, cursor, expert);
      if (shared.expert !== expert) {
        shared.expert = expert;
        shared.redraw.forEach((redraw) => redraw());
      } else paint();
    };
    canvas.addEventListener("pointermove", (event) => {
      const bounds = canvas.getBoundingClientRect();
      const rank = Math.floor((event.clientX - bounds.left - LEFT) / step);
      if (rank < 0 || rank >= bars.ranks.length) return;
      let below = ((base - (event.clientY - bounds.top)) / inner.h) * bars.most;
      const hit = bars.ranks[rank].find((segment) => (below -= segment.tokens) < 0);
      move(rank, hit ? hit.expert : null);
    });
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (way) move(cursor + way, null);
      else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        const own = bars.ranks[Math.max(cursor, 0)];
        const at = own.findIndex((segment) => segment.expert === shared.expert);
        const next = Math.min(Math.max(at + (event.key === "ArrowUp" ? 1 : -1), 0), own.length - 1);
        move(cursor, own[next] ? own[next].expert : null);
      } else return;
      event.preventDefault();
    });
    shared.redraw = shared.redraw.filter((other) => other.box !== box);
    paint.box = box;
    shared.redraw.push(paint);
    paint();
    box.replaceChildren(canvas);
  });
  return html("div", null, html("h3", null, bars.title), box, readout);
}

function summary(bars) {
  const sums = bars.ranks.map((segments) => segments.reduce((sum, s) => sum + s.tokens, 0));
  const most = Math.max(...sums, 0);
  const replicas = bars.ranks.flat().filter((s) => s.replica).length;
  return `${bars.title}: ${sums.length} ranks, the fullest is rank ${sums.indexOf(most)} with ${count(most)} tokens, the mean is ${count(bars.mean)}; ${replicas} replicas`;
}

function words(bars, rank, expert) {
  const own = bars.ranks[rank];
  const sum = own.reduce((total, s) => total + s.tokens, 0);
  const chosen = own.find((segment) => segment.expert === expert);
  const replicas = own.filter((s) => s.replica).length;
  const all = `rank ${rank}: ${count(sum)} tokens, ${(sum / Math.max(bars.mean, 1e-9)).toFixed(3)} of the mean, ${own.length - replicas} masters, ${replicas} replicas`;
  return chosen ? `${all}; expert ${expert}${chosen.replica ? " (replica)" : ""}: ${count(chosen.tokens)}` : all;
}

function paintSegment(pen, segment, place, { x, top, w, h }, kind, chosen) {
  if (h <= 0) return;
  pen.fillStyle = segment.replica ? colour(kind) : colour(place % 2 ? "master-a" : "master-b");
  pen.fillRect(x, top, w, h);
  if (segment.replica && w > 4 && h > 3) hatch(pen, { x, top, w, h });
  if (h > 3 && w > 3) {
    pen.strokeStyle = colour("raised");
    pen.lineWidth = 0.8;
    pen.strokeRect(x, top, w, h);
  }
  if (segment.expert === chosen) {
    pen.strokeStyle = colour("ink");
    pen.lineWidth = 2;
    pen.strokeRect(x + 1, top + 1, Math.max(w - 2, 0.5), Math.max(h - 2, 0.5));
  }
}

function hatch(pen, { x, top, w, h }) {
  pen.save();
  pen.beginPath();
  pen.rect(x, top, w, h);
  pen.clip();
  pen.strokeStyle = colour("paper");
  pen.lineWidth = 1;
  pen.beginPath();
  for (let at = x - h; at < x + w; at += 5) {
    pen.moveTo(at, top + h);
    pen.lineTo(at + h, top);
  }
  pen.stroke();
  pen.restore();
}

function axes(pen, bars, { width, tall, base, step, height }) {
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colour("faint");
  pen.strokeStyle = colour("rule");
  pen.lineWidth = 1;
  for (const tick of ticks(0, bars.most, 4)) {
    const y = base - tall(tick);
    pen.beginPath();
    pen.moveTo(LEFT, y);
    pen.lineTo(width - 8, y);
    pen.stroke();
    pen.textAlign = "right";
    pen.fillText(short(tick), LEFT - 6, y + 4);
  }
  pen.textAlign = "center";
  const every = Math.max(Math.ceil(26 / step), 1);
  for (let rank = 0; rank < bars.ranks.length; rank += every) pen.fillText(rank, LEFT + (rank + 0.5) * step, height - 5);
}

function meanLine(pen, bars, { width, y }) {
  pen.strokeStyle = colour("ink");
  pen.lineWidth = 1.2;
  pen.setLineDash([5, 4]);
  pen.beginPath();
  pen.moveTo(LEFT, y);
  pen.lineTo(width - 8, y);
  pen.stroke();
  pen.setLineDash([]);
}

export function barsLegend(kinds) {
  const box = (kind, striped) => svg("svg", { width: 14, height: 12, "aria-hidden": "true" },
    svg("rect", { class: "bar-" + kind, width: 14, height: 12 }),
    striped ? svg("path", { d: "M-2 12L10 0M4 14L16 2", stroke: "var(--paper)" }) : null);
  const master = svg("svg", { width: 14, height: 12, "aria-hidden": "true" },
    svg("rect", { width: 7, height: 12, fill: "var(--master-a)" }), svg("rect", { x: 7, width: 7, height: 12, fill: "var(--master-b)" }));
  return html("div", { class: "legend" },
    html("span", null, master, "masters, in turn light and dark"),
    kinds.map(([name, kind]) => html("span", null, box(kind, true), name)),
    html("span", null, "dashed line: mean"));
}

// Predicted times of parts for several plans: [{ name, parts, kind }], the first is what the others are compared with.
export function timesTable(plans) {
  const most = Math.max(...plans.map((plan) => plan.parts.total_ns), 1);
  const names = [
    ["plan", "plan_ns"], ["reroute", "reroute_ns"], ["weight sync", "weight_sync_ns"],
    ["all-to-all", "all_to_all_ns"], ["experts", "experts_ns"], ["critical path", "total_ns"],
  ];
  const bar = (plan, key) => html("span", null, time(plan.parts[key]), " ",
    svg("svg", { class: "inline", width: 46, height: 9, "aria-hidden": "true" },
      svg("rect", { class: "bar-" + plan.kind, width: Math.max((46 * plan.parts[key]) / most, plan.parts[key] > 0 ? 1 : 0), height: 9 })));
  const rows = names.map(([name, key]) => [name, ...plans.map((plan) => bar(plan, key))]);
  const base = plans[0].parts.total_ns;
  rows.push(["speed-up", ...plans.map((plan) => (base / Math.max(plan.parts.total_ns, 1)).toFixed(3) + "×")]);
  return table(["part", ...plans.map((plan) => plan.name)], rows, (index) => index === 5);
}

export function remoteWords(plan) {
  return `${count(plan.remote_tokens)} (${percent(plan.remote_share)})`;
}
