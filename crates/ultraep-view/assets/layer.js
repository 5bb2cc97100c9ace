// One layer: over time, its experts, its worst cases.
import { card, figures, html, ratio, short } from "./dom.js";
import { amountScale } from "./scale.js";
import { heatmap } from "./heatmap.js";
import { imbalanceLines, worstTable } from "./overview.js";

export function layerView(data, links) {
  const line = data.line;
  const open = (index) => links.go(links.microbatch(...data.series.places[index], data.layer));
  const neighbour = (layer, text) => (layer === null ? null : html("a", { href: links.layer(layer) }, text));
  return [
    html("h1", null, `Layer ${data.layer}`),
    html("p", null, neighbour(data.layer_below, `← layer ${data.layer_below}`), " ", neighbour(data.layer_above, `layer ${data.layer_above} →`)),
    figures([
      ["imbalance as routed, mean", ratio(line.before_mean), "before"],
      ["after, mean", ratio(line.after_mean), "after"],
      ["worst as routed", ratio(line.before_worst), "before"],
      ["worst after", ratio(line.after_worst), "after"],
    ]),
    html("div", { class: "cards" },
      card("Over time: choose a point for its worst microbatch", true,
        imbalanceLines(data.series, "Imbalance of the layer over time", open),
        data.microbatches_per_column > 1
          ? html("p", { class: "faint" }, `A point stands for ${data.microbatches_per_column} microbatches.`) : null),
      card("Loads of experts over time", false, expertHeat(data.experts)),
      card("Worst cases", false, worstTable(data.worst, links))),
  ];
}

function expertHeat(experts) {
  const columns = experts.steps.length;
  const most = Math.max(...experts.load, 1);
  const perRow = experts.experts / experts.groups;
  const name = (row) => (perRow > 1 ? `${Math.ceil(row * perRow)}+` : String(row));
  return heatmap({
    title: "Loads of experts over time", rows: experts.groups, columns, values: experts.load,
    scale: amountScale(most, "times an even share"), rowName: name, columnName: (c) => short(experts.steps[c]),
    summary: `${experts.experts} experts, the hottest ${most.toFixed(2)} times an even share`,
    hint: "rows: experts; columns: steps",
    describe: (r, c) => `expert ${name(r)}, from step ${experts.steps[c]}: ${experts.load[r * columns + c].toFixed(3)} times an even share; over all time ${experts.total[r].toFixed(3)}`,
  });
}
