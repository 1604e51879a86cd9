// A chat whose tokens are coloured by who wrote them.

import { KeyWanted, ask, events } from "./api.js";
import { SOURCES, element, legend } from "./views.js";

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

/** @param {() => void} wantKey what to do when a key is missing */
export function startPlayground(wantKey) {
  const form = byId("chat-form"), send = byId("send"), stop = byId("stop");
  byId("legend").replaceWith(Object.assign(legend(), { id: "legend" }));
  /** @type {AbortController | null} */
  let running = null;
  stop.addEventListener("click", () => running?.abort());
  byId("prompt").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    send.disabled = true;
    stop.disabled = false;
    try {
      await chat(running.signal);
    } catch (error) {
      if (error instanceof KeyWanted) wantKey();
      const stopped = error instanceof DOMException && error.name === "AbortError";
      say(stopped ? "Stopped." : `No answer: ${error instanceof Error ? error.message : error}`);
    } finally {
      running = null;
      send.disabled = false;
      stop.disabled = true;
    }
  });
}

/** @param {AbortSignal} signal */
async function chat(signal) {
  const answer = byId("answer");
  answer.replaceChildren();
  answer.setAttribute("aria-busy", "true");
  say("Waiting for the first token …");
  const models = await (await ask("v1/models", { signal })).json();
  const body = {
    model: models.data[0].id,
    messages: [{ role: "user", content: byId("prompt").value }],
    max_completion_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    aurora_token_sources: true,
  };
  const headers = { "content-type": "application/json" };
  const began = performance.now();
  /** @type {Record<string, number>} */
  const counts = {};
  try {
    const stream = await ask("v1/chat/completions", { method: "POST", headers, signal, body: JSON.stringify(body) });
    for await (const chunk of events(stream)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.aurora) {
        show(answer, chunk.aurora, counts);
        say(shares(counts, performance.now() - began));
      }
      if (chunk.usage) answer.dataset.completionTokens = chunk.usage.completion_tokens;
    }
  } finally {
    answer.removeAttribute("aria-busy");
  }
}

/**
 * @param {HTMLElement} answer
 * @param {{sources: string[], texts: string[]}} said
 * @param {Record<string, number>} counts
 */
function show(answer, said, counts) {
  said.sources.forEach((source, i) => {
    counts[source] = (counts[source] ?? 0) + 1;
    const title = SOURCES[/** @type {keyof SOURCES} */ (source)] ?? source;
    answer.append(element("span", { class: `token ${source}`, title }, said.texts[i]));
  });
}

/** @param {Record<string, number>} counts @param {number} milliseconds */
function shares(counts, milliseconds) {
  const all = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const parts = Object.entries(SOURCES).filter(([kind]) => counts[kind]).map(([kind, called]) =>
    `${called} ${counts[kind]} (${Math.round((100 * counts[kind]) / all)} %)`);
  return `${all} tokens, ${(all / (milliseconds / 1000)).toFixed(1)} a second: ${parts.join(", ")}`;
}

/** @param {string} text */
const say = (text) => {
  byId("shares").textContent = text;
};
