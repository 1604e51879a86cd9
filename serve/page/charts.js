// Small charts as SVG: plain functions from numbers to elements. Colours are classes, so that the style sheet has them.
// Widths are those of the place in pixels, so that letters have their size on every screen.

/**
 * @typedef {{time: number, value: number | null}} Sample  time: seconds since the epoch
 * @typedef {{name: string, style: string, samples: Sample[]}} Series  style: a class of the style sheet
 * @typedef {{name: string, parts: {style: string, share: number, title: string}[], text: string}} Bar
 * @typedef {{row: number, time: number, style: string, mark: string, title: string}} Event
 */

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190, LEFT = 40, RIGHT = 10, TOP = 10, BOTTOM = 24;
const LETTER = 7.5; // pixels of one, about
const GAP_S = 60; // without a sample, in which a line is not drawn on

/**
 * @param {string} name
 * @param {Record<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 * @returns {SVGElement}
 */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** @param {number} low @param {number} high @returns {number[]} two to six round numbers between them */
export function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough) ?? rough;
  const first = Math.ceil(low / step), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** @param {Sample[]} samples @returns {Sample[][]} runs of samples with a value and without a long gap */
export function runs(samples) {
  /** @type {Sample[][]} */
  const found = [];
  /** @type {Sample | null} */
  let before = null;
  for (const sample of samples) {
    if (sample.value !== null) {
      if (before === null || before.value === null || sample.time - before.time > GAP_S) found.push([]);
      found[found.length - 1].push(sample);
    }
    before = sample;
  }
  return found;
}

/** @param {number} seconds since the epoch */
export const clock = (seconds) =>
  new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

/** @param {number} value */
const short = (value) => String(Number(value.toPrecision(3)));

/**
 * Lines over time.
 * @param {Series[]} series
 * @param {{from: number, to: number, low: number, high: number, width: number, line?: number, label: string}} scale
 *   line: a value to compare with; label: what a screen reader says
 */
export function lines(series, scale) {
  const y = (/** @type {number} */ v) =>
    HEIGHT - BOTTOM - ((v - scale.low) / (scale.high - scale.low)) * (HEIGHT - TOP - BOTTOM);
  const x = across(scale), right = scale.width - RIGHT;
  const grid = ticks(scale.low, scale.high).map((v) =>
    svg("g", {},
      svg("line", { class: v === scale.line ? "compare" : "grid", x1: LEFT, x2: right, y1: y(v), y2: y(v) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, short(v))));
  const drawn = series.flatMap(({ name, style, samples }) =>
    runs(samples).map((run) => {
      const points = run.map((s) => `${x(s.time).toFixed(1)},${y(s.value ?? 0).toFixed(1)}`);
      const shape = run.length > 1
        ? svg("polyline", { class: `line ${style}`, points: points.join(" ") })
        : svg("circle", { class: `dot ${style}`, r: 2.5, cx: x(run[0].time), cy: y(run[0].value ?? 0) });
      shape.append(svg("title", {}, name));
      return shape;
    }));
  return picture(scale.width, HEIGHT, scale.label, ...grid, ...times(scale, HEIGHT, x), ...drawn);
}

/**
 * Marks on one line of time for each row.
 * @param {string[]} rows
 * @param {Event[]} events
 * @param {{from: number, to: number, width: number, label: string}} scale
 */
export function timeline(rows, events, scale) {
  const height = TOP + BOTTOM + 34 * rows.length;
  const y = (/** @type {number} */ row) => TOP + 34 * row + 22;
  const x = across(scale), right = scale.width - RIGHT;
  const names = rows.map((name, row) =>
    svg("g", {},
      svg("line", { class: "grid", x1: LEFT, x2: right, y1: y(row), y2: y(row) }),
      svg("text", { class: "tick", x: LEFT, y: y(row) - 11 }, name)));
  const marks = events
    .filter((event) => event.time >= scale.from && event.time <= scale.to)
    .map((event) =>
      svg("text", { class: `mark ${event.style}`, x: x(event.time), y: y(event.row) + 5, "text-anchor": "middle" },
        event.mark, svg("title", {}, event.title)));
  return picture(scale.width, height, scale.label, ...names, ...times(scale, height, x), ...marks);
}

/**
 * A bar for each name, of parts that are shares of 1.
 * @param {Bar[]} bars
 * @param {number} width
 * @param {string} label
 */
export function bars(bars, width, label) {
  const rows = bars.map((bar, i) => {
    const room = Math.max(Math.floor(width / LETTER) - bar.text.length - 2, 4);
    const name = bar.name.length > room ? `${bar.name.slice(0, room - 1)}…` : bar.name;
    let x = 0;
    const parts = bar.parts.map((part) => {
      const length = part.share * width;
      x += length;
      const at = { x: x - length, y: 34 * i + 18, width: length, height: 12 };
      const rect = svg("rect", { class: `fill ${part.style}`, ...at });
      rect.append(svg("title", {}, part.title));
      return rect;
    });
    return svg("g", {},
      svg("text", { class: "name", x: 0, y: 34 * i + 13 }, name, svg("title", {}, bar.name)),
      svg("text", { class: "name", x: width, y: 34 * i + 13, "text-anchor": "end" }, bar.text),
      svg("rect", { class: "track", x: 0, y: 34 * i + 18, width, height: 12 }), ...parts);
  });
  return picture(width, 34 * bars.length, label, ...rows);
}

/** @param {{from: number, to: number, width: number}} scale */
const across = ({ from, to, width }) => (/** @type {number} */ time) =>
  LEFT + ((time - from) / (to - from)) * (width - LEFT - RIGHT);

/** @param {{from: number, to: number}} scale @param {number} height @param {(time: number) => number} x */
function times(scale, height, x) {
  return [0, 1, 2, 3].map((i) => {
    const time = scale.from + (i / 3) * (scale.to - scale.from);
    const anchor = i === 0 ? "start" : i === 3 ? "end" : "middle";
    return svg("text", { class: "tick", x: x(time), y: height - 6, "text-anchor": anchor }, clock(time));
  });
}

/** @param {number} width @param {number} height @param {string} label @param {...Node} children */
function picture(width, height, label, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...children);
}
