"use strict";
// What both pages use: elements, numbers as text, the theme, axes of small plots. Text enters as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const element = (id) => document.getElementById(id);

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, action] of Object.entries(value)) node.addEventListener(event, action);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const html = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => filled(document.createElementNS(SVG, name), attributes, children);
const embedded = (id) => JSON.parse(element(id).textContent);

function shown(x, digits = 6) {
  const text = Math.abs(x) < 1e6 ? x.toFixed(digits) : x.toExponential(6);
  return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
}
const shownComplex = ([re, im]) =>
  Math.abs(im) < 5e-7 ? shown(re) : `${shown(re)} ${im < 0 ? "−" : "+"} ${shown(Math.abs(im))} i`;
const percent = (x) => `${Math.round(100 * x)} %`;

// A polyline's path; points are [x, y].
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// Axes in an SVG of its viewBox's size; returns the maps from values to positions.
function axes(target, { x, y, ticksX, ticksY, labelX, labelY }) {
  const [, , width, height] = target.getAttribute("viewBox").split(" ").map(Number);
  const [left, right, top, bottom] = [54, 12, 10, labelX ? 38 : 22];
  const at = (value, [low, high], from, to) => from + ((value - low) / (high - low)) * (to - from);
  const px = (value) => at(value, x, left, width - right);
  const py = (value) => at(value, y, height - bottom, top);
  target.replaceChildren();
  for (const t of ticksX) {
    const strong = t === 0 ? "var(--soft)" : "var(--rule)";
    target.append(svg("path", { d: path([[px(t), top], [px(t), height - bottom]]), stroke: strong, "stroke-width": t === 0 ? 0.8 : 1 }));
    target.append(svg("text", { x: px(t), y: height - bottom + 15, "text-anchor": "middle" }, String(t).replace("-", "−")));
  }
  for (const t of ticksY) {
    const strong = t === 0 ? "var(--soft)" : "var(--rule)";
    target.append(svg("path", { d: path([[left, py(t)], [width - right, py(t)]]), stroke: strong, "stroke-width": t === 0 ? 0.8 : 1 }));
    target.append(svg("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, String(t).replace("-", "−")));
  }
  target.append(svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle" }, labelX));
  target.append(svg("text", { transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, labelY));
  const inside = `clip-${target.id}`;
  target.append(svg("clipPath", { id: inside }, svg("rect", { x: left, y: top, width: width - right - left, height: height - bottom - top })));
  const drawing = svg("g", { "clip-path": `url(#${inside})` });
  target.append(drawing);
  return { px, py, drawing, line: (points, attributes) => drawing.append(svg("path", { d: path(points.map(([a, b]) => [px(a), py(b)])), fill: "none", ...attributes })) };
}

// Wide pictures are drawn for the width they get, so that their text stays legible.
const across = () => (innerWidth < 700 ? 340 : 460);

const roundUp = (x) => { const unit = 10 ** Math.floor(Math.log10(x)); return [1, 2, 5, 10].map((f) => f * unit).find((y) => y >= x); };
const ticks = (limit) => [-2, -1, 0, 1, 2].map((i) => i * Math.max(1, roundUp(limit / 2.2))).filter((t) => Math.abs(t) <= limit);

function legend(id, entries) {
  element(id).replaceChildren(...entries.map(([mark, text]) => html("li", {}, svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, mark), text)));
}
const stroke = (color, more = {}) => svg("path", { d: "M1 6H25", fill: "none", stroke: color, "stroke-width": 2.5, ...more });
const dotMark = (color, hollow = false) => svg("circle", { cx: 13, cy: 6, r: 4.5, fill: hollow ? "none" : color, stroke: color, "stroke-width": 1.5 });

// One button for the theme: of the system until it is pressed.
function themed() {
  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { element("theme").textContent = dark() ? "Light theme" : "Dark theme"; };
  element("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}
