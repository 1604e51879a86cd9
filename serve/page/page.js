// The page: asks the server for what is new every few seconds and shows it.

import { KeyWanted, ask, useKey } from "./api.js";
import { startPlayground } from "./playground.js";
import { HOUR_S, alarms, cards, domains, sources, speed, versions } from "./views.js";

/** @typedef {import("./views.js").Data} Data */

const POLL_MS = 3000;
const LEAST_WIDTH = 200; // pixels

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

/** @type {Data["points"]} */
let points = [];
/** @type {ReturnType<typeof setTimeout> | undefined} */
let next;
let shown = "";
/** @type {Data | null} */
let latest = null;
let chosen = ""; // replica to show; "": all of them
let turn = 0; // of asking: only the newest answer counts

async function poll() {
  clearTimeout(next);
  const mine = ++turn;
  try {
    const last = points[points.length - 1]?.time_s ?? 0;
    /** @type {Data} */
    const data = await (await ask(`aurora/data?since=${last}&replica=${encodeURIComponent(chosen)}`)).json();
    if (mine !== turn) return;
    if (data.replica !== chosen) return choose(data.replica); // that one has left, or does not answer
    points = [...points, ...data.points].filter((point) => point.time_s > data.now_s - HOUR_S);
    latest = { ...data, points };
    show(latest);
    status("live", "live");
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof KeyWanted) {
      wantKey();
      return;
    }
    status("the server does not answer; trying again", "lost");
  }
  next = setTimeout(poll, POLL_MS);
}

/** @param {string} replica to show from now on */
function choose(replica) {
  chosen = replica;
  points = [];
  poll();
}

/** @param {Data} data the choice is there where there is one */
function offer(data) {
  const select = byId("replica"), names = Object.keys(data.replicas);
  byId("replicas").hidden = names.length < 2;
  const offered = [...select.options].slice(1).map((option) => option.value);
  if (offered.join("\n") !== names.join("\n")) {
    select.replaceChildren(select.options[0], ...names.map((name) => new Option(name)));
  }
  for (const option of [...select.options].slice(1)) option.disabled = !data.replicas[option.value];
  select.value = data.replica;
}

/** @param {Data} data */
function show(data) {
  offer(data);
  byId("cards").replaceChildren(...cards(data));
  const raised = JSON.stringify(data.alarms);
  if (raised !== shown) byId("alarms").replaceChildren(...alarms(data)); // said once, not every few seconds
  shown = raised;
  for (const [id, view] of Object.entries({ speed, domains, sources, versions })) {
    const place = byId(id), scrolled = place.querySelector(".scroll")?.scrollTop ?? 0;
    if (place.contains(document.activeElement)) continue; // whoever reads there is not disturbed
    place.replaceChildren(...view(data, Math.max(place.clientWidth, LEAST_WIDTH)));
    const again = place.querySelector(".scroll");
    if (again) again.scrollTop = scrolled;
  }
}

/** @param {string} text @param {string} kind */
function status(text, kind) {
  const place = byId("connection");
  if (place.textContent !== text) place.textContent = text;
  place.className = kind;
}

function wantKey() {
  clearTimeout(next);
  status("a key is wanted", "lost");
  byId("key-wanted").hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-wanted").hidden = true;
  poll();
});

byId("replica").addEventListener("change", () => choose(byId("replica").value));
addEventListener("resize", () => requestAnimationFrame(() => latest && show(latest)));
startPlayground(wantKey);
poll();
