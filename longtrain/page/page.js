"use strict";
// Draws every chart of the page's data into its figure, again whenever the width changes. Hovering, or the arrow keys, read values off.

const ROLES = {
  "measured": { dash: "", marker: "" },
  "held-out": { dash: "", marker: "circle" },
  "predicted": { dash: "2 4", marker: "" },
  "limit": { dash: "8 4", marker: "" },
  "compared": { dash: "6 3", marker: "" },
  "reference": { dash: "1 3", marker: "square" },
};
const MARGIN = { top: 26, right: 14, bottom: 38, left: 58 };
const HEIGHT = 278;

function element(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function html(name, className, parent, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Numbers: thousands separated; `digits` after the point, or, where negative, as many significant ones.
function said(value, digits) {
  if (digits < 0) return value === 0 ? "0" : value.toPrecision(-digits).replace(/\.?0+(e|$)/, "$1");
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// Round steps (1, 2, 5 times a power of ten) from `low` to `high`, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
  return { step, found };
}

function logTicks(low, high, room) {
  const first = Math.ceil(Math.log2(low)), last = Math.floor(Math.log2(high));
  const every = Math.max(1, Math.ceil((last - first + 1) / room));
  const found = [];
  for (let i = first; i <= last; i += every) found.push(2 ** i);
  return found;
}

// Linear (or logarithmic) from `from` to `to`.
function scale(from, to, log) {
  const f = log ? Math.log : v => v, a = f(from[0]), b = f(from[1]);
  return v => to[0] + (to[1] - to[0]) * (b === a ? 0.5 : (f(v) - a) / (b - a));
}

// The range that shows the data: of a noisy start only what the eye needs, from zero where the chart says so.
function yRange(chart) {
  if (chart.range) return chart.range;
  const values = chart.series.flatMap(s => s.points.filter(p => p[1] !== null).flatMap(p => [p[1] - (p[2] || 0), p[1] + (p[2] || 0)]));
  values.push(...(chart.lines || []).map(l => l.y));
  let low = chart.zero ? 0 : Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  const pad = (high - low) * 0.06;
  return [chart.zero ? 0 : low - pad, high + pad];
}

function marker(kind, x, y, colour, parent) {
  if (kind === "circle") element("circle", { cx: x, cy: y, r: 4, fill: colour }, parent);
  if (kind === "square") element("rect", { x: x - 3, y: y - 3, width: 6, height: 6, fill: colour }, parent);
}

function swatch(role, marked, dots, parent) {
  const svg = element("svg", { width: 34, height: 12, "aria-hidden": "true" }, parent), colour = `var(--${role})`;
  if (!dots) element("line", { x1: 0, x2: 34, y1: 6, y2: 6, stroke: colour, "stroke-width": 2, "stroke-dasharray": ROLES[role].dash }, svg);
  if (marked) marker(dots ? "circle" : ROLES[role].marker, 17, 6, colour, svg);
}

function draw(chart, figure) {
  figure.querySelectorAll(".legend, .plot, .tip").forEach(old => old.remove());
  const series = chart.series.filter(s => s.points.length), lines = chart.lines || [];
  const legend = html("div", "legend", figure);
  for (const s of [...series, ...lines]) {
    const entry = html("span", "", legend);
    swatch(s.role, s.y === undefined, s.dots, entry);
    entry.append(s.y === undefined ? s.name : `${s.name} ${said(s.y, chart.digits)}`);
  }
  const plot = html("div", "plot", figure), width = plot.clientWidth;
  const svg = element("svg", { width, height: HEIGHT, role: "img", tabindex: 0, "aria-label": `${chart.title}: ${chart.note}` }, plot);
  const box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };

  const xs = series.flatMap(s => s.points.map(p => p[0]));
  const range = [Math.min(...xs), Math.max(...xs)], yr = yRange(chart);
  if (range[0] === range[1]) range[1] = range[0] + 1;
  const x = scale(range, [box.left + 6, box.right - 6], chart.log), y = scale(yr, [box.bottom, box.top]);

  const yTicks = ticks(yr[0], yr[1], 5), decimals = Math.max(0, -Math.floor(Math.log10(yTicks.step) + 1e-9));
  for (const tick of yTicks.found) {
    element("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), class: "grid" }, svg);
    const label = yTicks.step < 1e-3 ? (tick === 0 ? "0" : tick.toExponential(1)) : said(tick, decimals);
    element("text", { x: box.left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, label);
  }
  const room = Math.max(2, Math.floor((box.right - box.left) / 75));
  const xTicks = chart.log ? logTicks(range[0], range[1], room) : ticks(range[0], range[1], room).found.filter(Number.isInteger);
  for (const tick of xTicks) {
    element("line", { x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 5, class: "grid" }, svg);
    element("text", { x: x(tick), y: box.bottom + 18, "text-anchor": "middle" }, svg, said(tick, 0));
  }
  element("text", { x: (box.left + box.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, svg, chart.x);
  element("text", { x: 0, y: 10 }, svg, chart.y);

  for (const mark of chart.marks || []) {
    element("line", { x1: x(mark.x), x2: x(mark.x), y1: box.top, y2: box.bottom, class: "grid" }, svg);
    const late = x(mark.x) > (box.left + box.right) / 2;
    element("text", { x: x(mark.x) + (late ? -4 : 4), y: box.top + 8, "text-anchor": late ? "end" : "start" }, svg, mark.label);
  }
  for (const line of lines) {
    const style = { stroke: `var(--${line.role})`, "stroke-dasharray": ROLES[line.role].dash, class: "series" };
    element("line", { x1: box.left, x2: box.right, y1: y(line.y), y2: y(line.y), ...style }, svg);
  }
  for (const s of series) {
    const colour = `var(--${s.role})`, role = ROLES[s.role];
    let path = "", pen = "M";
    for (const p of s.points) {
      if (p[1] === null) { pen = "M"; continue; }
      path += `${pen}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`;
      pen = "L";
      if (p[2]) element("line", { x1: x(p[0]), x2: x(p[0]), y1: y(p[1] - p[2]), y2: y(p[1] + p[2]), stroke: colour, "stroke-width": 1.5 }, svg);
    }
    if (!s.dots) element("path", { d: path, class: "series", stroke: colour, "stroke-dasharray": role.dash }, svg);
    const shown = s.dots ? "circle" : role.marker || (s.points.length === 1 ? "circle" : "");
    if (shown) for (const p of s.points) if (p[1] !== null) marker(shown, x(p[0]), y(p[1]), colour, svg);
  }
  hover(chart, series, figure, plot, svg, x, box);
}

function nearest(points, at) {
  return points.reduce((best, p) => (p[1] !== null && (best === null || Math.abs(p[0] - at) < Math.abs(best[0] - at)) ? p : best), null);
}

function hover(chart, series, figure, plot, svg, x, box) {
  const places = [...new Set(series.flatMap(s => s.points.filter(p => p[1] !== null).map(p => p[0])))].sort((a, b) => a - b);
  const tip = html("div", "tip", figure);
  readOff(figure, plot, svg, tip, x, places, box.top, box.bottom, box.top, index => {
    const at = places[index], here = nearest(series[0].points, at) || nearest(series.at(-1).points, at);
    html("div", "", tip, `${chart.x} ${(here[0] === at && here[3]) || said(at, 0)}`);
    for (const s of series) {
      const p = nearest(s.points, at);
      if (p === null || (p[0] !== at && s.points.length < places.length)) continue;
      const error = p[2] ? ` ± ${said(p[2], chart.digits)}` : "";
      html("div", "", tip, `${s.name} ${said(p[1], chart.digits)}${error} ${chart.y}${p[4] ? `, ${p[4]}` : ""}`);
    }
  });
}

/* A line that follows the pointer, the finger or the arrow keys to the nearest of `places`, and a tip beside it that `fill` writes. */
function readOff(figure, plot, svg, tip, x, places, top, bottom, tipTop, fill) {
  const rule = element("line", { y1: top, y2: bottom, class: "hover", visibility: "hidden" }, svg);
  tip.hidden = true;
  let shown = -1;
  function show(index) {
    shown = index;
    tip.hidden = index < 0;
    rule.setAttribute("visibility", index < 0 ? "hidden" : "visible");
    if (index < 0) return;
    const at = x(places[index]), from = plot.offsetLeft + at + 12;
    rule.setAttribute("x1", at);
    rule.setAttribute("x2", at);
    tip.replaceChildren();
    fill(index);
    tip.style.top = `${plot.offsetTop + tipTop}px`;
    tip.style.left = `${Math.max(4, from + tip.offsetWidth > figure.clientWidth - 4 ? from - 24 - tip.offsetWidth : from)}px`;
  }
  function reach(event) {
    const at = event.clientX - svg.getBoundingClientRect().left;
    show(places.reduce((best, place, i) => (Math.abs(x(place) - at) < Math.abs(x(places[best]) - at) ? i : best), 0));
  }
  svg.addEventListener("pointermove", reach);
  svg.addEventListener("pointerdown", reach);
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(places.length - 1, Math.max(0, shown + step)));
  });
}

const drawn = JSON.parse(document.getElementById("charts").textContent);
const widths = new Map();
function drawAll() {
  for (const chart of drawn) {
    const figure = document.getElementById(chart.id);
    if (widths.get(chart.id) !== figure.clientWidth) draw(chart, figure);
    widths.set(chart.id, figure.clientWidth);
  }
}
window.addEventListener("resize", () => requestAnimationFrame(drawAll));
drawAll();
