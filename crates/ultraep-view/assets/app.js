// The page: addresses, keys, and what is shown.
import { html, restoreTheme, toggleTheme } from "./dom.js";
import { overviewView } from "./overview.js";
import { microbatchCards, microbatchFigures } from "./microbatch.js";
import { layerView } from "./layer.js";
import { whatIfPanel } from "./whatif.js";
import { follow } from "./live.js";

const main = document.getElementById("main");
const trail = document.getElementById("trail");
const status = document.getElementById("status");
const which = document.getElementById("which");
const keys = document.getElementById("keys");

let known = null;
let followed = null;
// Number of the change that is shown.
let revision = -1;
// Where keys lead from here: { next, previous, above, below, up }.
let ways = {};
// Grows with every view asked for: what arrives late is not shown.
let asked = 0;

async function get(path) {
  const response = await fetch(path);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// `#/0/layers/3?a=b` as { index, parts, query }.
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean);
  return { index: Number(parts[0]) || 0, parts: parts.slice(1), query: new URLSearchParams(query || "") };
}

function linksOf(index) {
  return {
    layer: (layer) => `#/${index}/layers/${layer}`,
    microbatch: (step, microbatch, layer) => `#/${index}/microbatch/${step}/${microbatch}/${layer}`,
    go: (to) => (location.hash = to),
  };
}

async function show({ isLive } = {}) {
  const ticket = ++asked;
  const { index, parts, query } = address();
  const base = `/api/recordings/${index}`;
  const links = linksOf(index);
  try {
    let view;
    if (parts[0] === "layers") view = await showLayer(base, links, Number(parts[1]), index);
    else if (parts[0] === "microbatch") view = isLive ? null : await showMicrobatch(base, links, parts.slice(1).map(Number), query, index);
    else view = await showOverview(base, links, index);
    if (ticket !== asked || !view) return;
    put(view, isLive);
  } catch (error) {
    if (ticket !== asked || isLive) return;
    ways = { up: `#/${index}` };
    put({ title: "Error", trail: crumbs(index, []), nodes: [html("p", { class: "error", role: "alert" }, error.message)] });
  }
}

// What a live view redraws keeps the scroll, and the focus where an element has an id.
function put(view, isLive) {
  const focused = isLive ? document.activeElement?.id : null;
  const scroll = isLive ? window.scrollY : 0;
  // Pictures are drawn after this: until then the page keeps its height, so that it can scroll back.
  main.style.minHeight = isLive ? `${main.offsetHeight}px` : "";
  document.title = `${view.title} – UltraEP`;
  trail.replaceChildren(...view.trail);
  main.replaceChildren(...view.nodes.flat(Infinity).filter(Boolean));
  main.dataset.view = view.title;
  window.scrollTo(0, scroll);
  requestAnimationFrame(() => requestAnimationFrame(() => {
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    main.style.minHeight = "";
  }));
}

function crumbs(index, rest) {
  const first = html("a", { href: `#/${index}` }, "overview");
  return [first, ...rest.flatMap((node) => [html("span", { "aria-hidden": "true" }, " › "), node])];
}

async function showOverview(base, links, index) {
  const data = await get(`${base}/overview`);
  showStatus(data.about, data.run);
  ways = { next: data.layers[0] && links.layer(data.layers[0].layer) };
  return { title: "Overview", trail: crumbs(index, []), nodes: overviewView(data, links) };
}

async function showLayer(base, links, layer, index) {
  const data = await get(`${base}/layers/${layer}`);
  showStatus(data.about);
  ways = {
    up: `#/${index}`,
    next: data.layer_above === null ? null : links.layer(data.layer_above),
    previous: data.layer_below === null ? null : links.layer(data.layer_below),
  };
  return { title: `Layer ${layer}`, trail: crumbs(index, [html("span", { "aria-current": "page" }, `layer ${layer}`)]), nodes: layerView(data, links) };
}

async function showMicrobatch(base, links, [step, microbatch, layer], query, index) {
  const place = `step=${step}&microbatch=${microbatch}&layer=${layer}`;
  const data = await get(`${base}/microbatch?${place}`);
  let other = null;
  let error = null;
  if ([...query].length) {
    try {
      other = await get(`${base}/microbatch?${place}&${query}`);
    } catch (refused) {
      error = refused.message;
    }
  }
  const here = links.microbatch(step, microbatch, layer);
  const tail = [...query].length ? `?${query}` : "";
  const to = (at, inLayer) => (at === null || inLayer === null ? null : links.microbatch(at[0], at[1], inLayer) + tail);
  ways = {
    up: links.layer(layer),
    next: to(data.next, layer), previous: to(data.previous, layer),
    above: to([step, microbatch], data.layer_above), below: to([step, microbatch], data.layer_below),
  };
  const settings = other ? other.settings : { ...data.settings, ...Object.fromEntries(query) };
  const apply = (chosen) => {
    if (chosen === null) return links.go(here);
    const changed = Object.entries(chosen).filter(([key, value]) => value !== String(data.settings[key]));
    // Settings equal to those in force still ask: a recorded plan is then planned anew.
    links.go(`${here}?${new URLSearchParams(changed.length ? changed : [["policy", chosen.policy]])}`);
  };
  const splitOf = (expert) => get(`${base}/split?${place}&expert=${expert}${other ? `&${query}` : ""}`);
  const way = (to, text) => (to ? html("a", { href: to }, text) : html("span", { class: "faint" }, text));
  const nodes = [
    html("h1", null, `Step ${step}, microbatch ${microbatch}, layer ${layer}`),
    html("p", null, way(ways.previous, "← earlier"), " ", way(ways.next, "later →"), " · ",
      way(ways.below, "↓ layer below"), " ", way(ways.above, "layer above ↑")),
    html("p", { class: "faint" }, data.is_recorded ? "The plan is the recorded one." : "No plan was recorded: planned by the settings below."),
    microbatchFigures(data),
    html("div", { class: "cards" }, whatIfPanel({ settings, known, apply, error, base: data, other }), microbatchCards(data, other, splitOf)),
  ];
  const steps = crumbs(index, [
    html("a", { href: links.layer(layer) }, `layer ${layer}`), html("span", { "aria-current": "page" }, `step ${step}, microbatch ${microbatch}`),
  ]);
  return { title: "Microbatch", trail: steps, nodes };
}

function showStatus(about, run) {
  revision = about.revision;
  const isReading = !about.is_read;
  const part = about.records ? Math.floor((100 * about.read) / about.records) : 0;
  status.className = about.is_live && !isReading ? "live" : "";
  status.textContent = isReading ? `reading, ${part}%` : about.is_live ? (about.is_run ? "live" : "not closed, followed") : run ? run.state : "";
}

function navigate() {
  const { index } = address();
  if (followed !== index) {
    followed = index;
    which.value = String(index);
    follow(index, (change) => {
      if (change.revision !== revision) show({ isLive: true });
    });
  }
  show();
  main.focus({ preventScroll: true });
}

const KEYS = {
  o: () => (location.hash = `#/${address().index}`),
  j: () => ways.next, k: () => ways.previous, J: () => ways.above, K: () => ways.below, u: () => ways.up,
  t: toggleTheme,
  w: () => document.getElementById("what-if-policy")?.focus(),
  "?": () => keys.showModal(),
};

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  const to = KEYS[event.key]();
  if (typeof to === "string") location.hash = to;
});
document.getElementById("theme").addEventListener("click", toggleTheme);
document.getElementById("help").addEventListener("click", () => keys.showModal());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
which.addEventListener("change", () => (location.hash = `#/${which.value}`));
window.addEventListener("hashchange", navigate);

restoreTheme();
get("/api/recordings").then((answer) => {
  known = answer;
  which.append(...known.recordings.map((about, index) => html("option", { value: String(index) }, about.title)));
  which.parentElement.hidden = known.recordings.length < 2;
  navigate();
}, (error) => main.replaceChildren(html("p", { class: "error", role: "alert" }, error.message)));
