"use strict";

const health = document.getElementById("health");
const reason = document.getElementById("reason");

async function look() {
  try {
    const answer = await (await fetch("/health")).json();
    health.textContent = answer.status;
    reason.textContent = answer.reason ?? "";
  } catch {
    health.textContent = "no answer";
    reason.textContent = "";
  }
  health.dataset.status = health.textContent;
}

setInterval(look, 2000);
