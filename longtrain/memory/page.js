"use strict";
// The timeline of a step: phases above, what was held by category below them, then the process, the tiers and the copies, on one clock.
// Uses the drawing functions of the report's page. Hovering, touching or the arrow keys read values off.

const profile = JSON.parse(document.getElementById("profile").textContent);
const GIB = 2 ** 30, SIDE = { left: 58, right: 14 };
const gib = bytes => said(bytes / GIB, Math.abs(bytes) >= 10 * GIB ? 2 : 3);

function stamp(seconds) {
  return seconds >= 1 ? `${said(seconds, 3)} s` : `${said(seconds * 1000, 2)} ms`;
}

function fits(text, room) {
  return text.length * 6.4 < room;
}

function short(part) {
  const names = part.split(".");
  return names.slice(/^\d+$/.test(names.at(-1)) ? -2 : -1).join(".");
}

function area(xs, lower, upper, x, y) {
  let path = "", back = "";
  for (let i = 0; i < xs.length; i++) {
    path += `${i ? "L" : "M"}${x(xs[i]).toFixed(1)},${y(upper[i]).toFixed(1)}`;
    back = `L${x(xs[i]).toFixed(1)},${y(lower[i]).toFixed(1)}${back}`;
  }
  return `${path}${back}Z`;
}

function axis(svg, range, top, bottom, left, right, label) {
  const y = scale(range, [bottom, top]), marks = ticks(range[0], range[1], Math.max(2, (bottom - top) / 55));
  const digits = Math.max(0, -Math.floor(Math.log10(marks.step) + 1e-9));
  for (const tick of marks.found) {
    element("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "grid" }, svg);
    element("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, svg, said(tick, digits));
  }
  element("text", { x: 0, y: top - 12 }, svg, label);
  return value => y(value / GIB);
}

function strip(svg, bands, key, top, height, x) {
  const merged = [];
  for (const band of bands) {
    const name = band[key];
    if (merged.length && merged.at(-1).name === name && merged.at(-1).phase === band.phase) merged.at(-1).stop = band.stop;
    else merged.push({ name, phase: band.phase, start: band.start, stop: band.stop });
  }
  for (const band of merged) {
    const a = x(band.start), width = Math.max(x(band.stop) - a, 0.5);
    const drawn = element("rect", { x: a, y: top, width, height, class: `band ${band.phase}` }, svg);
    element("title", {}, drawn, `${band.phase} ${band.name}`);
    const text = key === "part" ? short(band.name) : band.name;
    if (!text || !fits(text, width)) continue;
    element("text", { x: a + width / 2, y: top + height - 5, "text-anchor": "middle", class: "in" }, svg, text);
  }
}

function legend(figure, names, colour = name => `var(--${name})`) {
  const row = html("div", "legend", figure);
  for (const name of names) {
    const entry = html("span", "", row);
    html("i", "", entry).style.background = colour(name);
    entry.append(name);
  }
}

function curves(svg, lines, xs, x, y) {
  for (const [name, values] of lines) {
    const path = values.map((v, i) => `${i ? "L" : "M"}${x(xs[i]).toFixed(1)},${y(v).toFixed(1)}`).join("");
    element("path", { d: path, class: "series", stroke: `var(--${name})` }, svg);
  }
}

function drawTimeline(figure) {
  figure.querySelectorAll(".legend, .plot, .tip").forEach(old => old.remove());
  const line = profile.timeline, xs = line.seconds, names = profile.categories.filter(c => line.series[c]);
  legend(figure, names);
  const plot = html("div", "plot", figure), width = plot.clientWidth, left = SIDE.left, right = width - SIDE.right;
  const samples = line.samples, process = ["reserved", "used"].filter(k => samples[k]), tiers = ["host", "disk"].filter(k => samples[k]);
  const panels = { top: 62, main: width < 600 ? 230 : 300, gap: 42, small: 84, lane: 20 };
  let bottom = panels.top + panels.main;
  const height = bottom + (process.length ? panels.small + panels.gap : 0) + (tiers.length ? panels.small + panels.gap : 0)
    + (line.lanes.length ? line.lanes.length * panels.lane + panels.gap : 0) + 38;
  const label = `Timeline: ${profile.sentence}`;
  const svg = element("svg", { width, height, role: "img", tabindex: 0, "aria-label": label }, plot);
  const x = scale([0, Math.max(xs.at(-1), 1e-9)], [left, right]);

  strip(svg, line.bands, "phase", 0, 18, x);
  strip(svg, line.bands, "part", 20, 18, x);

  const ofProcess = profile.device === "CPU", budget = profile.budget;
  const most = Math.max(...line.level, ofProcess ? 0 : budget || 0) / GIB;
  const y = axis(svg, [0, most * 1.06 || 1], panels.top, bottom, left, right, "GiB, by what holds it");
  let lower = xs.map(() => 0);
  for (const name of names) {
    const upper = lower.map((v, i) => v + line.series[name][i]);
    element("path", { d: area(xs, lower, upper, x, y), fill: `var(--${name})` }, svg);
    lower = upper;
  }
  function limit(at) {
    element("line", { x1: left, x2: right, y1: at, y2: at, stroke: "var(--limit)", "stroke-dasharray": "8 4", class: "series" }, svg);
    element("text", { x: left + 4, y: at - 5, class: "in" }, svg, `budget ${gib(budget)} GiB`);
  }
  if (budget && !ofProcess) limit(y(budget));
  const highest = line.level.indexOf(Math.max(...line.level)), px = x(xs[highest]), py = y(line.level[highest]);
  element("path", { d: `M${px},${py - 2}l-5,-8h10Z`, class: "peak" }, svg);
  const [anchor, away] = px > (left + right) / 2 ? ["end", -9] : ["start", 9], peak = `peak ${gib(line.level[highest])} GiB`;
  element("text", { x: px + away, y: Math.max(py - 4, panels.top + 10), "text-anchor": anchor, class: "in" }, svg, peak);

  function small(keys, title, line) {
    const top = bottom + panels.gap;
    bottom = top + panels.small;
    const high = Math.max(...keys.flatMap(k => samples[k]), line) / GIB;
    const yy = axis(svg, [0, high * 1.08 || 1], top, bottom, left, right, title);
    curves(svg, keys.map(k => [k, samples[k]]), samples.seconds, x, yy);
    if (line) limit(yy(line));
    keys.forEach((key, i) => {
      const style = `fill: var(--${key})`;
      element("text", { x: right - 4 - 74 * i, y: top - 12, "text-anchor": "end", style }, svg, SAID[key] || key);
    });
  }
  if (process.length) small(process, "GiB, the process", ofProcess && budget ? budget : 0);
  if (tiers.length) small(tiers, "GiB in slower tiers", 0);
  if (line.lanes.length) {
    let top = bottom + panels.gap - 12;
    element("text", { x: 0, y: top - 4 }, svg, "copies and communication");
    for (const lane of line.lanes) {
      element("text", { x: left - 8, y: top + 14, "text-anchor": "end" }, svg, lane.name.slice(0, 9));
      element("line", { x1: left, x2: right, y1: top + 10, y2: top + 10, class: "grid" }, svg);
      const colour = lane.name.endsWith("disk") ? "disk" : lane.name.endsWith("host") ? "host" : "communication";
      for (const [a, b, bytes, count] of lane.spans) {
        const drawn = element("rect", { x: x(a), y: top + 3, width: Math.max(x(b) - x(a), 1), height: 14, fill: `var(--${colour})` }, svg);
        element("title", {}, drawn, `${lane.name}: ${gib(bytes)} GiB in ${count}, ${stamp(b - a)}`);
      }
      top += panels.lane;
    }
    bottom = top;
  }
  const times = ticks(0, xs.at(-1) || 1, Math.max(2, (right - left) / 90));
  const digits = Math.max(0, -Math.floor(Math.log10(times.step) + 1e-9));
  for (const tick of times.found) {
    element("line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 5, class: "grid" }, svg);
    element("text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, svg, said(tick, digits));
  }
  element("text", { x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" }, svg, "seconds");
  const tip = html("div", "tip memory", figure);
  readOff(figure, plot, svg, tip, x, xs, 40, bottom, 66, index => momentOf(tip, xs, names, index));
}

const SAID = { used: profile.device === "CPU" ? "resident" : "used" };

function momentOf(tip, xs, names, index) {
  const line = profile.timeline, at = xs[index], band = line.bands.find(b => at >= b.start && at <= b.stop);
  html("div", "", tip, `${stamp(at)}${band ? `, ${band.phase}${band.part ? ` of ${band.part}` : ""}` : ""}`);
  html("b", "", html("div", "", tip), `${gib(line.level[index])} GiB`);
  const parts = names.map(n => [n, line.series[n][index]]).filter(p => p[1]).sort((a, b) => b[1] - a[1]);
  html("div", "", tip, parts.slice(0, 6).map(([n, v]) => `${n} ${gib(v)}`).join(", "));
  for (const [number, bytes] of line.tops[index]) {
    const item = line.items[number];
    const where = [item.shape && ` ${item.shape}`, item.module && ` in ${item.module}`, item.line && `, ${item.line}`];
    html("div", "item", tip, `${gib(bytes)} GiB ${item.name}${where.join("")}`);
  }
}

let widthThen = 0;
function drawProfile() {
  const figure = document.getElementById("timeline");
  if (figure.clientWidth !== widthThen) drawTimeline(figure);
  widthThen = figure.clientWidth;
}
window.addEventListener("resize", () => requestAnimationFrame(drawProfile));
drawProfile();
