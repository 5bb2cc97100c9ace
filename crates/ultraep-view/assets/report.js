// The report: the overview and the worst microbatch, from data in the file itself.
import { html, restoreTheme, toggleTheme } from "./dom.js";
import { overviewBody } from "./overview.js";
import { microbatchCards, microbatchFigures } from "./microbatch.js";

restoreTheme();
const data = JSON.parse(document.getElementById("data").textContent);
document.getElementById("theme").addEventListener("click", toggleTheme);
document.getElementById("pictures").append(...overviewBody(data.overview, null).filter(Boolean));
for (const worst of data.microbatches) {
  document.getElementById("pictures").append(
    html("h2", null, `The worst as routed: step ${worst.step}, microbatch ${worst.microbatch}, layer ${worst.layer}`),
    microbatchFigures(worst),
    html("div", { class: "cards" }, microbatchCards(worst, null, null)));
}
