// Elements, numbers in words, and pictures that follow their width and the theme.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// An HTML element: attributes that are functions listen to the event of their name.
export function html(name, attributes, ...children) {
  return build(document.createElement(name), attributes, children);
}

export function svg(name, attributes, ...children) {
  return build(document.createElementNS(SVG, name), attributes, children);
}

// The value of a colour of the style sheet.
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

export function ratio(value) {
  return value === null || value === undefined ? "–" : value.toFixed(3);
}

export function percent(value) {
  return (100 * value).toFixed(1) + "%";
}

// 1234567 as 1 234 567, with spaces that do not break.
export function count(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}

// Large numbers in three digits.
export function short(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) return (value / (unit === "k" ? 1e3 : size)).toPrecision(3) + unit;
  }
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
}

export function time(ns) {
  if (ns < 1e3) return ns.toFixed(0) + " ns";
  if (ns < 1e6) return (ns / 1e3).toPrecision(3) + " µs";
  if (ns < 1e9) return (ns / 1e6).toPrecision(3) + " ms";
  return (ns / 1e9).toPrecision(3) + " s";
}

// Round steps that cover a range in about `wanted` parts.
export function ticks(low, high, wanted) {
  const span = Math.max(high - low, 1e-9);
  const rough = span / Math.max(wanted, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const values = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) values.push(value);
  return values;
}

// A box whose picture is drawn anew when its width or the theme changes. `draw(box, width)` fills it.
export function picture(draw) {
  const box = html("div", { class: "picture" });
  let drawn = 0;
  const redraw = () => {
    const width = Math.floor(box.clientWidth);
    if (width > 0) {
      drawn = width;
      draw(box, width);
    }
  };
  new ResizeObserver(() => {
    if (Math.floor(box.clientWidth) !== drawn) redraw();
  }).observe(box);
  const onTheme = () => (box.isConnected ? redraw() : document.removeEventListener("theme", onTheme));
  document.addEventListener("theme", onTheme);
  return box;
}

// Sizes a canvas in CSS pixels, sharp on any screen; gives a pen that draws in them, and how to wipe it clean.
export function penOn(canvas, width, height) {
  const dpr = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dpr);
  canvas.height = Math.round(height * dpr);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  const clear = () => {
    pen.setTransform(dpr, 0, 0, dpr, 0, 0);
    pen.clearRect(0, 0, width, height);
  };
  return { pen, clear };
}

// An id for the picture of this title: by it the focus finds a picture that was drawn anew.
export function pictureId(title) {
  return "picture-" + title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
}

// A table with a header row; cells are texts or nodes. `chosen` says which rows stand out.
export function table(header, rows, chosen) {
  const cell = (name, value) => html(name, name === "th" ? { scope: "col" } : null, value);
  return html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table: " + header.join(", ") },
    html("table", null,
      html("thead", null, html("tr", null, header.map((text) => cell("th", text)))),
      html("tbody", null, rows.map((row, index) =>
        html("tr", { class: chosen && chosen(index) ? "chosen" : null }, row.map((value) => cell("td", value)))))));
}

export function card(title, wide, ...children) {
  return html("section", { class: wide ? "card wide" : "card", "aria-label": title }, html("h2", null, title), children);
}

// Figures in large type: name, value, and the class of what they belong to.
export function figures(list) {
  return html("ul", { class: "figures" }, list.map(([name, value, kind]) =>
    html("li", { class: kind || null }, html("b", null, value), html("span", null, name))));
}

// The theme: as the system says until the user chooses.
export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function toggleTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  try {
    localStorage.setItem("ultraep-theme", document.documentElement.dataset.theme);
  } catch {
    // A page without storage forgets the choice.
  }
  document.dispatchEvent(new Event("theme"));
}

export function restoreTheme() {
  try {
    const chosen = localStorage.getItem("ultraep-theme");
    if (chosen) document.documentElement.dataset.theme = chosen;
  } catch {
    // As above.
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("theme")));
}
