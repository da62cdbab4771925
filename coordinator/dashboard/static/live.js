// Keeps a page up to date: the coordinator says when something has happened, and the parts that are marked are fetched
// anew. Without this script every page works the same, as of the moment when it was loaded.
"use strict";

const PAUSE_MS = 1000;
const RETRY_MS = 5000;
let waiting = false;
let late = false;

function told(text) {
  const place = document.getElementById("live-state");
  if (place && place.textContent !== text) place.textContent = text;
}

async function refresh() {
  if (waiting) { late = true; return; }
  waiting = true;
  try {
    const answer = await fetch(location.href, { credentials: "same-origin", redirect: "follow" });
    if (answer.redirected && new URL(answer.url).pathname === "/sign-in") { location.reload(); return; }
    if (!answer.ok) throw new Error(answer.status);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      const busy = old.contains(document.activeElement);
      if (fresh && !busy && fresh.innerHTML !== old.innerHTML) old.innerHTML = fresh.innerHTML;
    }
    told("live");
  } catch (error) {
    told("not reachable, trying again");
  }
  setTimeout(() => { waiting = false; if (late) { late = false; refresh(); } }, PAUSE_MS);
}

function listen() {
  const source = new EventSource("/live");
  source.addEventListener("changed", refresh);
  source.addEventListener("open", () => told("live"));
  source.addEventListener("ended", () => { source.close(); location.reload(); });
  source.addEventListener("error", () => {
    told("not reachable, trying again");
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { listen(); refresh(); }, RETRY_MS);
  });
  addEventListener("pagehide", () => source.close(), { once: true });
}

if (document.querySelector("[data-live]")) listen();

for (const form of document.querySelectorAll("form[data-once]")) {
  form.addEventListener("submit", () => {
    for (const button of form.querySelectorAll("button")) button.setAttribute("aria-disabled", "true");
  }, { once: true });
}
