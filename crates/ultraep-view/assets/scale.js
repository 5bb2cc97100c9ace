// A colour for a number: viridis, even steps for the eye and for every kind of colour vision.
import { count, html, svg } from "./dom.js";

const STOPS = [
  [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];

// `at` from 0 to 1.
export function viridis(at) {
  const place = Math.min(Math.max(at, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = STOPS[below].map((part, i) => Math.round(part + (STOPS[below + 1][i] - part) * (place - below)));
  return `rgb(${mix.join(",")})`;
}

// Imbalance from 1 to `most`, by ratio.
export function imbalanceScale(most) {
  const top = Math.max(most, 1.05);
  return { at: (value) => Math.log(Math.max(value, 1)) / Math.log(top), low: 1, high: top, name: "imbalance" };
}

// Amounts from 0 to `most`, by square root: small ones show.
export function amountScale(most, name) {
  const top = Math.max(most, 1e-9);
  return { at: (value) => Math.sqrt(value / top), low: 0, high: top, name };
}

export function scaleLegend(scale) {
  const steps = 24;
  const strip = svg("svg", { width: 160, height: 12, "aria-hidden": "true" });
  for (let i = 0; i < steps; i++) {
    const fill = viridis(i / (steps - 1));
    strip.append(svg("rect", { x: (160 / steps) * i, y: 0, width: 160 / steps + 0.5, height: 12, fill }));
  }
  const shown = (value) => (value >= 1000 ? count(value) : value.toPrecision(3));
  return html("div", { class: "legend" }, html("span", null, shown(scale.low)), strip, html("span", null, `${shown(scale.high)} ${scale.name}`));
}
