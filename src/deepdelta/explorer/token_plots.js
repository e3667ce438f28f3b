"use strict";
// Pictures of one token's state: over the depth of the model, and in one rewrite, channel by channel.

const CHANNEL = ["", "6 4", "2 3", "9 3 2 3"]; // value channels differ by dashes as well as by shade
const shade = (i) => ({ opacity: 1 - 0.2 * Math.min(i, 3), "stroke-dasharray": CHANNEL[i % CHANNEL.length] });

// A strip over all rewrites with lines of numbers, one per channel; `series` are lists of [place, value].
function strip(id, { title, series, range, ticksY, last, steps, current, colour, pick, mark }) {
  const target = svg("svg", { id, class: "strip", role: "img", viewBox: `0 0 ${across()} ${last ? 126 : 110}`, "aria-label": `${title} over the rewrites.` });
  const every = Math.max(1, Math.ceil(steps / 12));
  const [left, right] = [0.4 - steps / 60, steps + 0.7 + steps / 60]; // room for the marks between and after rewrites
  const ticksX = Array.from({ length: steps }, (_, i) => i + 1).filter((i) => (i - 1) % every === 0);
  const { px, drawing, line, py } = axes(target, { x: [left, right], y: range, ticksX, ticksY, labelX: last ? "rewrite" : "", labelY: title });
  drawing.append(svg("rect", { x: px(current - 0.42), y: 0, width: px(current + 0.42) - px(current - 0.42), height: 200, fill: "var(--accent)", opacity: 0.16 }));
  series.forEach((points, i) => {
    line(points, { stroke: colour, "stroke-width": 1.8, ...shade(i) });
    for (const [x, y] of points) drawing.append(svg("circle", { cx: px(x), cy: py(y), r: 2.6, fill: colour, opacity: shade(i).opacity }));
  });
  if (mark !== undefined) line([[left, mark], [right, mark]], { stroke: "var(--before)", "stroke-dasharray": "3 4" });
  target.addEventListener("click", (event) => {
    const box = target.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * across();
    pick(Math.round(left + ((x - 54) / (across() - 66)) * (right - left)));
  });
  return target;
}

function depthPictures(r, run, token, current, pick) {
  const steps = run.rewrites.length;
  const over = (name) => {
    const values = run.rewrites.map((rewrite) => rewrite[name]?.[token] ?? null);
    const channels = Math.max(...values.map((value) => value?.length ?? 0));
    return Array.from({ length: channels }, (_, j) => values.flatMap((value, i) => (value === null ? [] : [[i + 1, value[j]]])));
  };
  const norms = over("state_norm").map((points, j) => [...points, [steps + 0.6, run.rewrites[steps - 1].state_norm_after[token][j]]]);
  const top = roundUp(Math.max(1e-6, ...norms.flat().map(([, y]) => y)));
  const common = { steps, current, pick };
  const pictures = [];
  const gates = over("beta");
  if (gates.length) {
    const [low, high] = [Math.min, Math.max].map((end, i) => end(2 * i, ...gates.flat().map(([, y]) => y)));
    const pad = 0.04 * (high - low); // learned gates may leave [0, 2]
    pictures.push(strip(`gate-${r}`, { ...common, title: "gate β", series: gates, range: [low - pad, high + pad], ticksY: ticks(Math.max(2, high, -low)).filter((y) => y >= low && y <= high), colour: "var(--after)", mark: 1 }));
  }
  pictures.push(strip(`cosine-${r}`, { ...common, title: "cos(k, X)", series: over("cosine"), range: [-1.08, 1.08], ticksY: [-1, 0, 1], colour: "var(--k)" }));
  const said = run.lens.flatMap((state, i) => (state[token].next === null ? [] : [[i + 0.5, state[token].next[0]]]));
  pictures.push(strip(`norm-${r}`, { ...common, title: "norm of X", series: norms, range: [0, 1.05 * top], ticksY: [0, top / 2, top], colour: "var(--spectrum)", last: !said.length }));
  if (said.length) pictures.push(strip(`next-${r}`, { ...common, title: "p(next)", series: [said], range: [0, 1.05], ticksY: [0, 0.5, 1], colour: "var(--v)", last: true }));
  return pictures;
}

// Per value channel where the state stood along k before, where it stands now, and the target.
function rewritePicture(r, { read, after, target }) {
  const rows = read.length;
  const limit = roundUp(Math.max(1e-6, ...[...read, ...after, ...(target ?? [])].map(Math.abs)));
  const picture = svg("svg", { id: `rewrite-${r}`, role: "img", viewBox: `0 0 ${across()} ${56 + 30 * rows}`, "aria-label": `Along k, per value channel: ${read.map((x, j) => `channel ${j + 1} from ${shown(x, 3)} to ${shown(after[j], 3)}${target ? `, target ${shown(target[j], 3)}` : ""}`).join("; ")}.` });
  const { px, py, drawing } = axes(picture, { x: [-1.04 * limit, 1.04 * limit], y: [rows + 0.6, 0.4], ticksX: [-limit, -limit / 2, 0, limit / 2, limit], ticksY: read.map((_, j) => j + 1), labelX: "along k", labelY: "channel" });
  read.forEach((x, j) => {
    const y = py(j + 1);
    drawing.append(svg("path", { d: `M${px(x)} ${y}H${px(after[j])}`, stroke: "var(--after)", "stroke-width": 2.5 }));
    if (target) drawing.append(svg("path", { d: `M${px(target[j])} ${y - 11}v22`, stroke: "var(--v)", "stroke-width": 3 }));
    drawing.append(svg("circle", { cx: px(x), cy: y, r: 5, fill: "var(--card)", stroke: "var(--before)", "stroke-width": 2 }));
    drawing.append(svg("circle", { cx: px(after[j]), cy: y, r: 5.5, fill: "var(--after)" }));
  });
  return picture;
}
