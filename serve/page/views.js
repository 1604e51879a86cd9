// What the server's data looks like: pure functions from `/aurora/data` to elements.

import { bars, clock, lines, timeline } from "./charts.js";

/**
 * @typedef {{time_s: number, speed_up: number | null, tokens_per_s: number | null, acceptance_length: number | null,
 *   emitted: number, domains: Record<string, [number, number]>, sources: Record<string, number>, version: number}} Point
 * @typedef {{time_s: number, kind: string, before: number, after: number, replica: string}} Swap
 * @typedef {{kind: string, number: number, published_s: number, gated: number | null, rejected_s: number | null,
 *   reason: string}} Version
 * @typedef {{now_s: number, points: Point[], swaps: Swap[], versions: Version[], live: Record<string, number>,
 *   state: Record<string, number | null>, alarms: Record<string, string>,
 *   replica: string, replicas: Record<string, Record<string, number> | null>}} Data
 */

export const HOUR_S = 3600;
const RECENT_S = 300;
const LEAST_S = 300; // of time that a chart shows
const MOST_DOMAINS = 8;

/** Who may write a token -> what it is called. Each is a class of the style sheet, too. */
export const SOURCES = {
  target: "target", ngram: "n-gram table", eagle3: "EAGLE-3 drafter", model: "draft model", unknown: "unknown",
};

/**
 * @param {string} name
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** @param {number | null | undefined} value @param {number} digits */
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** @param {number} share */
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

/** @param {number} count @param {string} what @returns {string} */
const counted = (count, what) => `${count.toLocaleString("en")} ${what}`;

/** @param {Data} data @returns {HTMLElement[]} terms and what they are now */
export function cards(data) {
  const last = data.points[data.points.length - 1];
  const state = data.state;
  const alive = state.trainer_alive === null ? "none" : state.trainer_alive ? "learning" : "not reachable";
  const values = [
    ["Speed-up (estimate)", last ? `${number(last.speed_up, 2)} ×` : "–"],
    ["Tokens a second of engine time", number(last?.tokens_per_s, 1)],
    ["Acceptance length", number(last?.acceptance_length, 2)],
    ["Drafter version", drafting(data)],
    ["Trainer", alive],
    ["Time it computes", state.training_share === null ? "–" : percent(state.training_share)],
    ["Drift of the traffic", state.drift === null ? "–" : state.drift ? "yes" : "no"],
    ["Step-time error", state.step_time_error === null ? "–" : percent(state.step_time_error)],
    ["Swaps", number(state.swaps_total, 0)],
    ["Rolled back", number(state.rollbacks_total, 0)],
    ["Traces dropped", number(state.traces_dropped_total, 0)],
    ["Requests refused", number(state.requests_refused_total, 0)],
  ];
  const replicas = Object.values(data.replicas);
  if (replicas.length) values.push(["Replicas", `${replicas.filter(Boolean).length} of ${replicas.length} answer`]);
  return values.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value)));
}

/** @param {Data} data @returns {string} the neural drafter's version; of replicas that differ, each one's */
function drafting(data) {
  const shown = data.replica ? [] : Object.entries(data.replicas);
  const each = shown.flatMap(([name, live]) => (live ? [{ name, version: live.eagle3 ?? 0 }] : []));
  if (new Set(each.map(({ version }) => version)).size > 1) {
    return each.map(({ name, version }) => `${name}: ${version || "none"}`).join(", ");
  }
  return data.live.eagle3 ? String(data.live.eagle3) : "none";
}

/** @param {Data} data */
export function alarms(data) {
  return Object.entries(data.alarms).map(([kind, meaning]) =>
    element("li", {}, element("strong", {}, `Alarm ${kind}: `), `${meaning}; see docs/reliability.md.`));
}

/** @param {Data} data @param {number} width @returns {Node[]} */
export function speed(data, width) {
  const samples = data.points.map((point) => ({ time: point.time_s, value: point.speed_up }));
  const values = samples.flatMap(({ value }) => (value === null ? [] : [value]));
  if (!values.length) return [empty("No steps yet: send a request.")];
  const high = Math.max(1.5, ...values) * 1.05, low = Math.min(0.5, ...values);
  const label = `Estimated speed-up, ${values[values.length - 1].toFixed(2)} at last, ` +
    `from ${Math.min(...values).toFixed(2)} to ${Math.max(...values).toFixed(2)}`;
  return [lines([{ name: "speed-up", style: "speed", samples }], { ...span(data), width, low, high, line: 1, label })];
}

/** @param {Data} data @param {number} width @returns {Node[]} */
export function domains(data, width) {
  const recent = summed(data.points.filter((point) => point.time_s > data.now_s - RECENT_S));
  const total = Object.keys(recent).length ? recent : summed(data.points);
  const ranked = Object.entries(total).sort(([, a], [, b]) => b[0] - a[0]).slice(0, MOST_DOMAINS);
  if (!ranked.length) return [empty("No drafts yet.")];
  const series = ranked.slice(0, 5).map(([name], i) => ({
    name: name || "no domain",
    style: `series-${i}`,
    samples: data.points.map((point) => {
      const [drafted, accepted] = point.domains[name] ?? [0, 0];
      return { time: point.time_s, value: drafted ? accepted / drafted : null };
    }),
  }));
  const rows = ranked.map(([name, [drafted, accepted]], i) => {
    const text = `${percent(accepted / drafted)} of ${counted(drafted, "drafts")}`;
    return {
      name: name || "no domain", text,
      parts: [{ style: i < 5 ? `series-${i}` : "other", share: accepted / drafted, title: text }],
    };
  });
  const said = rows.map((row) => `${row.name} ${row.text}`).join(", ");
  const since = total === recent ? "the last five minutes" : "the last hour";
  return [
    lines(series, { ...span(data), width, low: 0, high: 1, label: "Acceptance by domain over time" }),
    bars(rows, width, `Acceptance by domain in ${since}: ${said}`),
  ];
}

/** @param {Point[]} points @returns {Record<string, [number, number]>} */
function summed(points) {
  /** @type {Record<string, [number, number]>} */
  const total = {};
  for (const point of points) {
    for (const [name, [drafted, accepted]] of Object.entries(point.domains)) {
      const before = total[name] ?? [0, 0];
      if (drafted) total[name] = [before[0] + drafted, before[1] + accepted];
    }
  }
  return total;
}

/** @param {Data} data @param {number} width @returns {Node[]} */
export function sources(data, width) {
  const rows = [
    ["last five minutes", data.points.filter((point) => point.time_s > data.now_s - RECENT_S)],
    ["last hour", data.points],
  ].flatMap(([name, points]) => sourceBar(String(name), /** @type {Point[]} */ (points)));
  if (!rows.length) return [empty("No tokens yet.")];
  const said = rows.map((row) => `${row.name}: ${row.parts.map((part) => part.title).join(", ")}`).join("; ");
  return [bars(rows, width, `Who wrote the tokens. ${said}`), legend()];
}

/** @param {string} name @param {Point[]} points */
function sourceBar(name, points) {
  const kinds = Object.entries(SOURCES).map(([kind, called]) => ({
    kind, called, count: points.reduce((sum, point) => sum + (point.sources[kind] ?? 0), 0),
  }));
  const all = kinds.reduce((sum, { count }) => sum + count, 0);
  if (!all) return [];
  const parts = kinds.filter(({ count }) => count).map(({ kind, called, count }) => ({
    style: kind, share: count / all, title: `${called} ${percent(count / all)}`,
  }));
  return [{ name, parts, text: counted(all, "tokens") }];
}

/** The colours of the sources and their names. */
export function legend() {
  const items = Object.entries(SOURCES).filter(([kind]) => kind !== "unknown").map(([kind, called]) =>
    element("li", {}, element("span", { class: `token ${kind}` }, called)));
  return element("ul", { class: "legend" }, ...items);
}

/** @param {Data} data @param {number} width @returns {Node[]} */
export function versions(data, width) {
  const kinds = [...new Set([...data.versions, ...data.swaps].map((each) => each.kind))].sort();
  const happened = kinds.flatMap((kind, row) => history(data, kind).map((event) => ({ ...event, row, kind })));
  if (!happened.length) return [empty("No drafter learns here.")];
  const names = kinds.map((kind) => SOURCES[/** @type {keyof SOURCES} */ (kind)] ?? kind);
  const label = `${happened.length} events of drafter versions; the table below lists them`;
  const newest = [...happened].sort((a, b) => b.time - a.time).slice(0, 30);
  const table = element("table", {},
    element("thead", {}, row("th", ["Time", "Drafter", "Version", "What"])),
    element("tbody", {}, ...newest.map((event) =>
      row("td", [clock(event.time), names[event.row], String(event.number), event.what]))));
  const marks = ["○ published", "▲ swapped in", "✕ rejected or rolled back"].map((mark) => element("li", {}, mark));
  return [
    timeline(names, happened, { ...span(data), width, label }),
    element("ul", { class: "legend" }, ...marks),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Events of versions" }, table),
  ];
}

/** @param {Data} data @param {string} kind */
function history(data, kind) {
  const versions = data.versions.filter((each) => each.kind === kind);
  const gated = (/** @type {Version} */ v) => (v.gated === null ? "" : `, gate ${v.gated.toFixed(2)} tokens a step`);
  const rejected = versions.filter((each) => each.rejected_s !== null);
  return [
    ...versions.map((v) => event(v.published_s, v.number, "published", "○", `published${gated(v)}`)),
    ...data.swaps.filter((swap) => swap.kind === kind).map((swap) => {
      const what = swap.before ? `swapped in after ${swap.before}` : "drafts since the start";
      return event(swap.time_s, swap.after, "swapped", "▲", swap.replica ? `${what}, ${swap.replica}` : what);
    }),
    ...rejected.map((v) => event(v.rejected_s ?? 0, v.number, "rejected", "✕", `rejected: ${v.reason}`)),
  ];
}

/** @param {number} time @param {number} number @param {string} style @param {string} mark @param {string} what */
const event = (time, number, style, mark, what) =>
  ({ time, number, style, mark, what, title: `version ${number} ${what}, ${clock(time)}` });

/** @param {string} cell @param {string[]} texts */
const row = (cell, texts) => element("tr", {}, ...texts.map((text) => element(cell, {}, text)));

/** @param {string} text */
const empty = (text) => element("p", { class: "empty" }, text);

/** @param {Data} data @returns {{from: number, to: number}} what a chart shows: at most an hour */
export function span(data) {
  const first = Math.min(data.points[0]?.time_s ?? data.now_s, ...data.swaps.map((swap) => swap.time_s));
  return { from: Math.max(Math.min(first, data.now_s - LEAST_S), data.now_s - HOUR_S), to: data.now_s };
}
