// The overview of a run or recording.
import { card, count, figures, html, percent, ratio, short, table, time } from "./dom.js";
import { imbalanceScale } from "./scale.js";
import { heatmap } from "./heatmap.js";
import { histogram, lines } from "./lines.js";

// `links` gives addresses: layer(layer), microbatch(step, microbatch, layer), and go(address); null where there is nothing
// to go to.
export function overviewView(data, links) {
  const about = data.about;
  const layers = `${data.layer_count} ${data.layer_count === 1 ? "layer" : "layers"}`;
  return [
    html("h1", { class: "path" }, about.title),
    html("p", { class: "faint" },
      `${about.format}: ${about.ranks} ranks in domains of ${about.domain}, ${about.experts} experts, ${layers}` +
      `${about.top_k ? `, top-${about.top_k}` : ""}; steps ${data.first_step} to ${data.last_step}`),
    about.error ? html("p", { class: "error", role: "alert" }, about.error) : null,
    html("div", { id: "words" }, data.words.map((sentence) => html("p", null, sentence))),
    overviewBody(data, links),
  ];
}

// Figures, notes and pictures, without what is said in words.
export function overviewBody(data, links) {
  const about = data.about;
  return [
    figures([
      ["imbalance as routed, mean", ratio(data.before.mean), "before"],
      [`imbalance under ${about.policy || "the plan"}, mean`, data.after.count ? ratio(data.after.mean) : "–", "after"],
      ["worst as routed", ratio(data.before.worst), "before"],
      ["worst after", data.after.count ? ratio(data.after.worst) : "–", "after"],
      ["replicas a layer", data.replicas_mean.toFixed(1)],
      ["tokens on another rank", data.remote_share === null ? "–" : percent(data.remote_share)],
    ]),
    about.notes.length ? html("ul", { class: "notes" }, about.notes.map((note) => html("li", null, note))) : null,
    html("div", { class: "cards" },
      heatCards(data, links),
      card("How imbalance is distributed", false, histogram({
        title: "Imbalance of layers and microbatches", edges: data.distribution.edges, shown: (x) => x.toPrecision(3), xName: "imbalance",
        series: [
          { name: "as routed", counts: data.distribution.before, kind: "bar-before" },
          { name: "after balancing", counts: data.distribution.after, kind: "bar-after" },
        ],
      })),
      card("Over time, all layers", false, imbalanceLines(data.series, "Imbalance over time")),
      data.run ? runCards(data.run) : null,
      card("Worst cases", false, worstTable(data.worst, links)),
      card("Layers", false, layersTable(data, links))),
  ];
}

function heatCards(data, links) {
  const heat = data.heat;
  const known = [...heat.before, ...heat.after].filter((value) => value !== null);
  const scale = imbalanceScale(Math.max(...known, 1));
  const rows = heat.layers.length;
  const columns = heat.steps.length;
  const rowName = (row) => (heat.layers_per_row > 1 ? `${heat.layers[row]}+` : String(heat.layers[row]));
  const make = (title, values, legend) => card(title, false, heatmap({
    title, rows, columns, values, scale, rowName, columnName: (c) => short(heat.steps[c]), legend,
    summary: `${rows} layers, ${columns} columns of time, imbalance up to ${ratio(scale.high)}`,
    hint: "rows: layers; columns: steps",
    describe: (r, c) => `layer ${rowName(r)}, from step ${heat.steps[c]}: mean imbalance ${ratio(values[r * columns + c])}`,
    open: links ? (r) => links.go(links.layer(heat.layers[r])) : null,
  }));
  return [make("Layers over time, as routed", heat.before), make("Layers over time, after balancing", heat.after)];
}

export function imbalanceLines(series, title, open) {
  return lines({
    title, x: series.steps, xName: "step", low: 1, shown: ratio, open,
    series: [
      { name: "worst as routed", values: series.before_worst, kind: "before faded" },
      { name: "mean as routed", values: series.before_mean, kind: "before" },
      { name: "worst after", values: series.after_worst, kind: "after faded" },
      { name: "mean after", values: series.after_mean, kind: "after" },
    ],
  });
}

export function worstTable(cases, links) {
  const place = (c) => `step ${c.step}, microbatch ${c.microbatch}, layer ${c.layer}`;
  const rows = cases.map((c) => [
    links ? html("a", { href: links.microbatch(c.step, c.microbatch, c.layer) }, place(c)) : place(c),
    ratio(c.before), ratio(c.after), String(c.replicas), count(c.tokens),
  ]);
  return table(["microbatch", "as routed", "after", "replicas", "tokens"], rows);
}

function layersTable(data, links) {
  const rows = data.layers.map((line) => [
    links ? html("a", { href: links.layer(line.layer) }, `layer ${line.layer}`) : `layer ${line.layer}`,
    ratio(line.before_mean), ratio(line.before_worst), ratio(line.after_mean), ratio(line.after_worst),
  ]);
  const left = data.layer_count - rows.length;
  return [html("div", { class: "tall" }, table(["layer", "mean as routed", "worst", "mean after", "worst after"], rows)),
    left > 0 ? html("p", { class: "faint" }, `and ${left} more`) : null];
}

function runCards(run) {
  const state = run.reason ? `${run.state}: ${run.reason}` : run.state;
  const steps = run.steps ? `${count(run.steps_done)} of ${count(run.steps)} steps` : `${count(run.steps_done)} steps`;
  const profile = run.profile
    ? `; ${run.profile.every === 1 ? "every step" : `one step in ${run.profile.every}`} recorded, ${count(run.profile.dropped)} records dropped` : "";
  const curves = [{ name: run.policy || "training", values: run.loss.values, kind: "after" }];
  // A reference's curve on the steps of the training's.
  for (const reference of run.references) {
    const at = new Map(reference.loss.steps.map((step, index) => [step, reference.loss.values[index]]));
    curves.push({ name: `reference ${reference.policy}`, values: run.loss.steps.map((step) => at.get(step) ?? null), kind: "other" });
  }
  if (run.validation.steps.length) {
    const nearest = (step) => run.loss.steps.reduce((best, other, index) =>
      (Math.abs(other - step) < Math.abs(run.loss.steps[best] - step) ? index : best), 0);
    const values = run.loss.steps.map(() => null);
    run.validation.steps.forEach((step, index) => (values[nearest(step)] = run.validation.values[index]));
    curves.push({ name: "held-out text", values, kind: "before" });
  }
  return [
    card("Loss", false,
      html("p", { class: "faint" }, `${state}; ${steps}; started ${run.started}${run.ended ? `, ended ${run.ended}` : ""}${profile}`),
      lines({ title: "Loss", x: run.loss.steps, xName: "step", series: curves, shown: (v) => v.toFixed(4) })),
    card("Parallel time of a step", false,
      lines({ title: "Parallel time of a step", x: run.step_ms.steps, xName: "step", low: 0, shown: (v) => time(v * 1e6),
        series: [{ name: "milliseconds", values: run.step_ms.values, kind: "after" }] })),
    run.table ? card("Policies side by side", true, policyTable(run)) : null,
  ];
}

function policyTable(run) {
  const rows = run.table.rows.map((row) => [
    row.policy, ratio(row.imbalance_before.mean), ratio(row.imbalance_after.mean), ratio(row.imbalance_after.worst),
    row.replicas_per_layer.toFixed(1), percent(row.tokens_crossed_fraction), time(row.step_ns),
    row.share_of_ideal === null ? "–" : percent(row.share_of_ideal), short(Math.round(row.throughput_tokens_per_s)),
    count(row.peak_tokens_per_rank),
  ]);
  return [
    run.table.title ? html("p", { class: "faint" }, run.table.title) : null,
    table(["policy", "as routed", "after", "worst after", "replicas", "crossed", "step", "of ideal", "tokens/s", "peak"], rows,
      (index) => run.table.rows[index].policy === run.policy),
    run.table.notes.map((note) => html("p", { class: "faint" }, note)),
  ];
}
