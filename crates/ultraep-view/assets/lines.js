// Curves and histograms as SVG, with a cursor for mouse and keys, and its values in words below.
import { count, html, picture, pictureId, short, svg, ticks } from "./dom.js";

const MARGIN = { left: 46, right: 10, top: 8, bottom: 20 };

// `plot`: title, x (numbers), xName, series [{ name, values (null for none), kind }], shown(value), height,
// and open(index) where a point leads somewhere.
export function lines(plot) {
  const readout = html("div", { class: "readout", "aria-live": "polite" }, plot.hint || "\u00a0");
  const all = plot.series.flatMap((series) => series.values).filter((value) => Number.isFinite(value));
  const low = plot.low === undefined ? Math.min(...all) : plot.low;
  const high = Math.max(...all, low + 1e-3);
  const height = plot.height || 190;
  if (all.length === 0) return html("p", { class: "faint" }, "Nothing yet.");
  let cursor = -1;
  const box = picture((box, width) => {
    const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    const last = Math.max(plot.x.length - 1, 1);
    const px = (index) => MARGIN.left + (inner.w * index) / last;
    const py = (value) => MARGIN.top + inner.h * (1 - (value - low) / (high - low));
    const root = svg("svg", {
      id: pictureId(plot.title), width, height, tabindex: 0, role: plot.open ? "button" : "img", "aria-label": describe(plot, all),
    });
    for (const tick of ticks(low, high, 4)) {
      root.append(svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(tick), y2: py(tick) }));
      root.append(svg("text", { x: MARGIN.left - 6, y: py(tick) + 4, "text-anchor": "end" }, short(Number(tick.toPrecision(6)))));
    }
    const every = Math.max(Math.ceil(plot.x.length / Math.max(Math.floor(inner.w / 80), 1)), 1);
    for (let index = 0; index < plot.x.length; index += every) {
      const anchor = index === 0 ? "start" : "middle";
      root.append(svg("text", { x: px(index), y: height - 4, "text-anchor": anchor }, short(plot.x[index])));
    }
    for (const series of plot.series) root.append(curve(series, px, py));
    const line = svg("line", { class: "cursor", y1: MARGIN.top, y2: MARGIN.top + inner.h, visibility: "hidden" });
    root.append(line);
    const move = (index) => {
      cursor = Math.min(Math.max(index, 0), plot.x.length - 1);
      line.setAttribute("x1", px(cursor));
      line.setAttribute("x2", px(cursor));
      line.setAttribute("visibility", "visible");
      const parts = plot.series.map((s) => `${s.name} ${Number.isFinite(s.values[cursor]) ? plot.shown(s.values[cursor]) : "–"}`);
      readout.textContent = `${plot.xName} ${count(plot.x[cursor])}: ${parts.join(", ")}`;
    };
    const at = (event) => Math.round(((event.clientX - root.getBoundingClientRect().left - MARGIN.left) / inner.w) * last);
    root.addEventListener("pointermove", (event) => move(at(event)));
    if (plot.open) root.addEventListener("click", (event) => {
      move(at(event));
      plot.open(cursor);
    });
    root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
      if (step) move(cursor + step);
      else if (event.key === "Enter" && plot.open && cursor >= 0) plot.open(cursor);
      else return;
      event.preventDefault();
    });
    if (plot.open) root.style.cursor = "pointer";
    box.replaceChildren(root);
  });
  return html("div", null, legend(plot.series), box, readout);
}

function describe(plot, all) {
  const shown = plot.series.map((series) => {
    const known = series.values.filter((value) => Number.isFinite(value));
    return known.length === 0 ? null : `${series.name} from ${plot.shown(known[0])} to ${plot.shown(known[known.length - 1])}`;
  });
  return `${plot.title}: ${all.length} values. ${shown.filter(Boolean).join("; ")}`;
}

// Gaps where a value is missing; a lone value is a dot.
function curve(series, px, py) {
  let path = "";
  let isPen = false;
  const group = svg("g");
  series.values.forEach((value, index) => {
    if (!Number.isFinite(value)) {
      isPen = false;
      return;
    }
    path += `${isPen ? "L" : "M"}${px(index).toFixed(1)} ${py(value).toFixed(1)}`;
    isPen = true;
    const isLone = !Number.isFinite(series.values[index - 1]) && !Number.isFinite(series.values[index + 1]);
    if (isLone) group.append(svg("circle", { class: series.kind, cx: px(index), cy: py(value), r: 2.5 }));
  });
  group.append(svg("path", { class: series.kind, d: path, "stroke-width": 1.8 }));
  return group;
}

export function legend(series) {
  return html("div", { class: "legend" }, series.map((one) => html("span", null,
    svg("svg", { width: 26, height: 8, "aria-hidden": "true" },
      svg("path", { class: one.kind, d: "M0 4H26", "stroke-width": 2 })), one.name)));
}

// `edges` of one more than bars; `series` [{ name, counts, kind }] side by side in every bar's place.
export function histogram({ title, edges, series, shown, xName }) {
  const readout = html("div", { class: "readout", "aria-live": "polite" }, "\u00a0");
  const most = Math.max(...series.flatMap((s) => s.counts), 1);
  const height = 190;
  const bars = edges.length - 1;
  let cursor = -1;
  const box = picture((box, width) => {
    const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    // By square root: the few worst must show beside the many.
    const tall = (n) => inner.h * Math.sqrt(n / most);
    const base = MARGIN.top + inner.h;
    const root = svg("svg", { id: pictureId(title), width, height, tabindex: 0, role: "img", "aria-label": `${title}: ${bars} bars from ${shown(edges[0])} to ${shown(edges[bars])}` });
    root.append(svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: base, y2: base }));
    for (const part of [0.25, 1]) {
      const n = Math.round(most * part);
      root.append(svg("text", { x: MARGIN.left - 6, y: base - tall(n) + 8, "text-anchor": "end" }, short(n)));
    }
    const step = inner.w / bars;
    const each = step / series.length;
    series.forEach((one, place) => one.counts.forEach((n, bar) => {
      if (n === 0) return;
      const h = Math.max(tall(n), 1.5);
      root.append(svg("rect", { class: one.kind, x: MARGIN.left + bar * step + place * each, y: base - h, width: Math.max(each - 0.6, 0.8), height: h }));
    }));
    const every = Math.max(Math.ceil(bars / Math.max(Math.floor(inner.w / 64), 1)), 1);
    for (let bar = 0; bar < bars; bar += every) {
      root.append(svg("text", { x: MARGIN.left + bar * step, y: height - 4, "text-anchor": bar === 0 ? "start" : "middle" }, shown(edges[bar])));
    }
    const move = (bar) => {
      cursor = Math.min(Math.max(bar, 0), bars - 1);
      const parts = series.map((s) => `${s.name} ${count(s.counts[cursor])}`);
      readout.textContent = `${xName} ${shown(edges[cursor])} to ${shown(edges[cursor + 1])}: ${parts.join(", ")}`;
    };
    root.addEventListener("pointermove", (event) =>
      move(Math.floor((event.clientX - root.getBoundingClientRect().left - MARGIN.left) / step)));
    root.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      move(cursor + way);
      event.preventDefault();
    });
    box.replaceChildren(root);
  });
  const key = series.map((one) => html("span", null,
    svg("svg", { width: 12, height: 12, "aria-hidden": "true" }, svg("rect", { class: one.kind, width: 12, height: 12 })), one.name));
  return html("div", null, html("div", { class: "legend" }, key), box, readout);
}
