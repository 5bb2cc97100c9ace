// Who sends which expert to whom: a tree for every expert (and stripe) that moves.
import { html, svg } from "./dom.js";

const SHOWN = 12;
const STEP_X = 74;
const STEP_Y = 22;

export function transferTrees(transfers) {
  const trees = new Map();
  for (const [expert, from, to, depth, stripe, stripes] of transfers.tasks) {
    const key = `${expert}/${stripe}`;
    if (!trees.has(key)) trees.set(key, { expert, stripe, stripes, edges: [] });
    trees.get(key).edges.push({ from, to, depth });
  }
  const ordered = [...trees.values()].sort((a, b) => b.edges.length - a.edges.length || a.expert - b.expert || a.stripe - b.stripe);
  if (ordered.length === 0) return html("p", { class: "faint" }, "No expert moves.");
  const box = html("div", { class: "trees" }, ordered.slice(0, SHOWN).map(figure));
  const rest = ordered.slice(SHOWN);
  if (rest.length === 0) return box;
  const more = html("button", { type: "button", click: () => {
    box.append(...rest.map(figure));
    more.remove();
  } }, `Show ${rest.length} more`);
  return html("div", null, box, more);
}

function figure(tree) {
  const children = new Map();
  const receivers = new Set(tree.edges.map((edge) => edge.to));
  for (const edge of tree.edges) {
    if (!children.has(edge.from)) children.set(edge.from, []);
    children.get(edge.from).push(edge.to);
  }
  const root = tree.edges.map((edge) => edge.from).find((rank) => !receivers.has(rank));
  const places = [];
  let leaves = 0;
  let deepest = 0;
  const place = (rank, depth, from) => {
    deepest = Math.max(deepest, depth);
    const own = { rank, depth, from, y: 0 };
    const below = (children.get(rank) || []).map((child) => place(child, depth + 1, own));
    own.y = below.length === 0 ? leaves++ : (below[0].y + below[below.length - 1].y) / 2;
    places.push(own);
    return own;
  };
  place(root, 0, null);
  const x = (node) => 20 + node.depth * STEP_X;
  const y = (node) => 14 + node.y * STEP_Y;
  const drawing = svg("svg", {
    width: 46 + deepest * STEP_X, height: 14 + leaves * STEP_Y, role: "img",
    "aria-label": `expert ${tree.expert}: ` + tree.edges.map((edge) => `rank ${edge.from} to ${edge.to}`).join(", "),
  });
  for (const node of places.filter((node) => node.from)) {
    const [x1, y1, x2, y2] = [x(node.from), y(node.from), x(node), y(node)];
    drawing.append(svg("path", { class: "link", d: `M${x1} ${y1}C${x1 + 34} ${y1} ${x2 - 34} ${y2} ${x2} ${y2}` }));
  }
  for (const node of places) {
    drawing.append(svg("circle", { class: node.from ? "node" : "node root", cx: x(node), cy: y(node), r: 10 }));
    drawing.append(svg("text", { class: node.from ? "label" : "on-root", x: x(node), y: y(node) + 4, "text-anchor": "middle" }, String(node.rank)));
  }
  const stripe = tree.stripes > 1 ? `, stripe ${tree.stripe + 1} of ${tree.stripes}` : "";
  return html("figure", null, html("figcaption", null, `expert ${tree.expert}${stripe}`), drawing);
}
