"use strict";
// The picture of states before and after the layers, in two or three dimensions, with the handles that set a layer.

const SCALE = 600 / 4.3;
const STEPS_ROUND = 72;

// A fixed cloud: low-discrepancy points in a ball of radius 1.55, so that the page is the same every time.
function cloud(dim) {
  const radical = (i, base) => { let [f, r, n] = [1, 0, i]; while (n > 0) { f /= base; r += f * (n % base); n = Math.floor(n / base); } return r; };
  const points = [];
  for (let i = 1; points.length < 36; i += 1) {
    const p = [2, 3, 5].slice(0, dim).map((base) => 3.1 * radical(i, base) - 1.55);
    if (norm(p) < 1.55) points.push(p);
  }
  return points;
}
const CLOUDS = { 2: cloud(2), 3: cloud(3) };

// Closed curves on the unit circle or sphere.
function curves(dim) {
  const round = (at) => Array.from({ length: STEPS_ROUND + 1 }, (_, i) => at((2 * Math.PI * i) / STEPS_ROUND));
  if (dim === 2) return [round((t) => [Math.cos(t), Math.sin(t)])];
  const parallels = [-60, -30, 0, 30, 60].map((h) => {
    const [r, z] = [Math.cos((h * Math.PI) / 180), Math.sin((h * Math.PI) / 180)];
    return round((t) => [r * Math.cos(t), r * Math.sin(t), z]);
  });
  const meridians = [0, 30, 60, 90, 120, 150].map((a) => {
    const [x, y] = [Math.cos((a * Math.PI) / 180), Math.sin((a * Math.PI) / 180)];
    return round((t) => [x * Math.cos(t), y * Math.cos(t), Math.sin(t)]);
  });
  return [...parallels, ...meridians];
}
const CURVES = { 2: curves(2), 3: curves(3) };

// Right, up and toward the viewer as vectors.
function camera({ dim, turn, tilt }) {
  if (dim === 2) return { right: [1, 0], up: [0, 1], toward: [0, 0] };
  const [t, p] = [(turn * Math.PI) / 180, (tilt * Math.PI) / 180];
  return {
    right: [-Math.sin(t), Math.cos(t), 0],
    up: [-Math.sin(p) * Math.cos(t), -Math.sin(p) * Math.sin(t), Math.cos(p)],
    toward: [Math.cos(p) * Math.cos(t), Math.cos(p) * Math.sin(t), Math.sin(p)],
  };
}
const seen = (view, x) => [300 + SCALE * dot(view.right, x), 300 - SCALE * dot(view.up, x)];

// The unit vector along k, also where |k| = 0, and a vector orthogonal to it on which the target's handle sits.
function frame(state, view, layer) {
  const along = vector(state.dim, { ...layer, length: 1 });
  if (state.dim === 2) return { along, across: [-along[1], along[0]] };
  const flat = plus(view.right, along, -dot(view.right, along));
  const across = norm(flat) > 0.2 ? flat : plus(view.up, along, -dot(view.up, along));
  return { along, across: scaled(across, 1 / norm(across)) };
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// Drawn in two strokes: what lies behind the middle of the picture is fainter.
function curve(target, view, points, attributes) {
  const runs = { front: [], back: [] };
  for (let i = 1; i < points.length; i += 1) {
    const side = dot(view.toward, points[i]) >= 0 ? "front" : "back";
    runs[side].push(path([seen(view, points[i - 1]), seen(view, points[i])]));
  }
  if (runs.back.length) target.append(svg("path", { ...attributes, d: runs.back.join(""), opacity: 0.3 * (attributes.opacity ?? 1) }));
  target.append(svg("path", { ...attributes, d: runs.front.join("") }));
}

function drawScene(target, state, layers, view) {
  const [dim, selected] = [state.dim, layers[state.selected]];
  const through = (x) => layers.reduce((trail, layer) => [...trail, rewrite(layer, trail[trail.length - 1])], [x]);
  const last = (x) => layers.reduce((y, layer) => rewrite(layer, y), x);
  const thin = dim === 3 ? 1 : 1.8;
  for (const points of CURVES[dim]) curve(target, view, points, { fill: "none", stroke: "var(--before)", "stroke-width": thin, "stroke-dasharray": dim === 2 ? "5 5" : null, opacity: dim === 3 ? 0.45 : 1 });
  for (const points of CURVES[dim]) curve(target, view, points.map(last), { fill: "none", stroke: "var(--after)", "stroke-width": thin + 0.4, opacity: dim === 3 ? 0.7 : 1 });
  for (const x of CLOUDS[dim]) {
    const trail = through(x).map((y) => seen(view, y));
    target.append(svg("path", { d: path(trail), fill: "none", stroke: "var(--after)", "stroke-width": 1.1, opacity: layers.length > 1 ? 0.22 : 0.38 }));
    const [[bx, by], [ax, ay]] = [trail[0], trail[trail.length - 1]];
    target.append(svg("circle", { cx: bx, cy: by, r: 3.6, fill: "var(--card)", stroke: "var(--before)", "stroke-width": 1.4 }));
    target.append(svg("circle", { cx: ax, cy: ay, r: 4, fill: "var(--after)" }));
  }
  // Where k^T x = v: the states that the marked layer leaves alone.
  const { along, across } = frame(state, view, state.layers[state.selected]);
  const length = norm(selected.k);
  if (length > 0.02) {
    const centre = scaled(along, selected.v / length);
    if (dim === 2) {
      target.append(svg("path", { d: path([seen(view, plus(centre, across, -5)), seen(view, plus(centre, across, 5))]), stroke: "var(--v)", "stroke-width": 2.4 }));
    } else {
      const other = [along[1] * across[2] - along[2] * across[1], along[2] * across[0] - along[0] * across[2], along[0] * across[1] - along[1] * across[0]];
      const disc = Array.from({ length: 49 }, (_, i) => plus(plus(centre, across, 1.35 * Math.cos((i * Math.PI) / 24)), other, 1.35 * Math.sin((i * Math.PI) / 24)));
      target.append(svg("path", { d: path(disc.map((x) => seen(view, x))), fill: "var(--v)", "fill-opacity": 0.13, stroke: "var(--v)", "stroke-width": 1.6 }));
    }
  }
  // The line of k with the places that beta n = 0, 1 and 2 send its unit vector to, and the other layers' directions.
  state.layers.forEach((layer, i) => {
    const d = vector(dim, { ...layer, length: 1 });
    const chosen = i === state.selected;
    target.append(svg("path", { d: path([seen(view, scaled(d, chosen ? -1.95 : 0)), seen(view, scaled(d, chosen ? 1.95 : 1))]), stroke: "var(--k)", "stroke-width": chosen ? 1.4 : 2, opacity: chosen ? 0.75 : 0.5, "stroke-dasharray": chosen ? null : "2 4" }));
  });
  for (const place of [1, 0, -1]) {
    const [x, y] = seen(view, scaled(along, place));
    target.append(svg("circle", { cx: x, cy: y, r: 3, fill: "var(--k)" }));
  }
}

// Handles of the marked layer: role slider, dragged or moved by arrow keys. `set` takes what is to be changed.
function handles(target, state, set) {
  const place = () => {
    const view = camera(state);
    const layer = state.layers[state.selected];
    const { along, across } = frame(state, view, layer);
    const s = layer.beta * layer.length ** 2;
    const centre = layer.length > 0.02 ? clamp(layer.v / layer.length, -1.9, 1.9) : 0;
    return {
      view, layer, along,
      beta: seen(view, scaled(along, clamp(1 - s, -1.9, 1.05))),
      k: seen(view, scaled(along, 1.45)),
      v: seen(view, plus(scaled(along, centre), across, state.dim === 2 ? 1.62 : 1.35)),
    };
  };
  const pointed = (event) => {
    const box = target.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * 600, ((event.clientY - box.top) / box.height) * 600];
  };
  // How far along k a point of the picture is, in units of the state.
  const reach = ({ view, along }, [x, y]) => {
    const axis = [dot(view.right, along), dot(view.up, along)];
    return ((x - 300) / SCALE * axis[0] - (y - 300) / SCALE * axis[1]) / Math.max(dot(axis, axis), 0.1);
  };
  const aimed = ({ view }, [px, py]) => {
    let [x, y] = [(px - 300) / SCALE, -(py - 300) / SCALE];
    if (state.dim === 2) return { angle: Math.round((Math.atan2(y, x) * 180) / Math.PI) };
    const far = Math.hypot(x, y) / 1.45;
    [x, y] = far > 1 ? [x / far / 1.45, y / far / 1.45] : [x / 1.45, y / 1.45];
    const d = plus(plus(scaled(view.right, x), view.up, y), view.toward, Math.sqrt(Math.max(0, 1 - x * x - y * y)));
    return { angle: Math.round((Math.atan2(d[1], d[0]) * 180) / Math.PI), height: Math.round((Math.asin(clamp(d[2], -1, 1)) * 180) / Math.PI) };
  };
  const hundredth = (x) => Math.round(100 * x) / 100;
  const around = (angle) => ((angle + 540) % 360) - 180;
  const kinds = {
    v: {
      name: "Target v", text: "v", range: [-1.5, 1.5],
      value: (layer) => layer.v,
      drag: (now, at) => ({ v: hundredth(clamp(reach(now, at) * now.layer.length, -1.5, 1.5)) }),
      key: (layer, right, up) => ({ v: hundredth(clamp(layer.v + 0.05 * (right + up), -1.5, 1.5)) }),
    },
    beta: {
      name: "Gate beta", text: "β", range: [0, 2],
      value: (layer) => layer.beta,
      drag: (now, at) => ({ beta: hundredth(clamp((1 - reach(now, at)) / Math.max(now.layer.length ** 2, 0.01), 0, 2)) }),
      key: (layer, right, up) => ({ beta: hundredth(clamp(layer.beta + 0.05 * (right + up), 0, 2)) }),
    },
    k: {
      name: "Direction k, degrees", text: "k", range: [-180, 180],
      value: (layer) => layer.angle,
      drag: aimed,
      key: (layer, right, up) => state.dim === 2 ? { angle: around(layer.angle + 5 * (right + up)) } : { angle: around(layer.angle + 5 * right), height: clamp(layer.height + 5 * up, -90, 90) },
    },
  };
  const made = Object.entries(kinds).map(([kind, { name, text, range, drag, key, value }]) => {
    const colour = { beta: "var(--after)", k: "var(--k)", v: "var(--v)" }[kind];
    const shape = kind === "beta" ? svg("rect", { class: "halo", x: -12.5, y: -12.5, width: 25, height: 25, rx: 5, fill: colour, stroke: "var(--card)", "stroke-width": 2 }) : svg("circle", { class: "halo", r: 14, fill: colour, stroke: "var(--card)", "stroke-width": 2 });
    const node = svg("g", { class: "handle", id: `handle-${kind}`, role: "slider", tabindex: 0, "aria-label": name, "aria-valuemin": range[0], "aria-valuemax": range[1] }, svg("circle", { r: 22, fill: "transparent" }), shape, svg("text", {}, text));
    const move = (event) => set(drag(place(), pointed(event)));
    node.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      event.stopPropagation();
      node.focus();
      node.setPointerCapture(event.pointerId);
      node.addEventListener("pointermove", move);
    });
    for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => node.removeEventListener("pointermove", move));
    node.addEventListener("keydown", (event) => {
      const [right, up] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
      if (!right && !up) return;
      event.preventDefault();
      set(key(state.layers[state.selected], right, up));
    });
    return { kind, node, value };
  });
  return () => {
    const now = place();
    for (const { kind, node, value } of made) {
      node.setAttribute("transform", `translate(${now[kind][0].toFixed(1)} ${now[kind][1].toFixed(1)})`);
      node.setAttribute("aria-valuenow", value(now.layer));
      if (!node.parentNode) target.append(node);
      node.toggleAttribute("hidden", kind === "v" && now.layer.length <= 0.02);
    }
  };
}

// In 3-D the picture itself turns by a drag.
function turning(target, state, changed) {
  let from = null;
  target.addEventListener("pointerdown", (event) => {
    if (state.dim !== 3) return;
    from = [event.clientX, event.clientY, state.turn, state.tilt];
    target.setPointerCapture(event.pointerId);
  });
  target.addEventListener("pointermove", (event) => {
    if (!from) return;
    state.turn = Math.round(((from[2] - (event.clientX - from[0]) * 0.45 + 540) % 360) - 180);
    state.tilt = Math.round(clamp(from[3] + (event.clientY - from[1]) * 0.45, -90, 90));
    changed();
  });
  for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => { from = null; });
}
