"use strict";
// The explorer's state, its controls and its numbers.

const PRESETS = embedded("data").presets;
const state = { dim: 2, layers: [], selected: 0, channels: 4, steps: 4, turn: -35, tilt: 20, preset: null };
const fresh = () => ({ beta: 1, angle: 90 * (state.layers.length % 2) + 30, height: 25, length: 1, v: 0 });
const solved = () => state.layers.map((layer) => ({ beta: layer.beta, v: layer.v, k: vector(state.dim, layer) }));

function change(changes) {
  Object.assign(state.layers[state.selected], changes);
  state.preset = null;
  update();
}

// A labelled slider with its number; `read` and `write` are of the state.
function control(parent, { id, label, min, max, step, read, write, name }) {
  const take = (event) => {
    const value = Number(event.target.value);
    if (event.target.value === "" || !Number.isFinite(value)) return;
    write(clamp(value, min, max));
  };
  const on = { input: take };
  const slider = element(id) ?? html("input", { type: "range", id, min, max, step });
  const number = element(`${id}-number`) ?? html("input", { type: "number", id: `${id}-number`, min, max, step, "aria-label": `${name ?? label} as a number` });
  for (const input of [slider, number]) filled(input, { on }, []);
  const rows = parent ? [html("label", { for: id }, label), slider, number] : [];
  parent?.append(...rows);
  number.addEventListener("blur", () => update());
  return (visible = true) => {
    for (const row of rows) row.hidden = !visible;
    slider.value = read();
    if (document.activeElement !== number) number.value = Number(read().toFixed(6));
  };
}

const marked = (name) => ({ read: () => state.layers[state.selected][name], write: (value) => change({ [name]: value }) });
const own = (name) => ({ read: () => state[name], write: (value) => { state[name] = value; update(); } });
const controls = {
  beta: control(null, { id: "beta", label: "β", min: 0, max: 2, step: 0.01, ...marked("beta") }),
  angle: control(element("controls"), { id: "angle", label: "k: angle", min: -180, max: 180, step: 1, ...marked("angle") }),
  height: control(element("controls"), { id: "height", label: "k: height", min: -90, max: 90, step: 1, ...marked("height") }),
  length: control(element("controls"), { id: "length", label: "k: length", min: 0, max: 1.5, step: 0.01, ...marked("length") }),
  v: control(element("controls"), { id: "v", label: "v", min: -1.5, max: 1.5, step: 0.01, ...marked("v") }),
  channels: control(element("controls"), { id: "channels", label: "Channels V", min: 1, max: 8, step: 1, ...own("channels") }),
  turn: control(element("controls"), { id: "turn", label: "View: turn", min: -180, max: 180, step: 1, ...own("turn") }),
  tilt: control(element("controls"), { id: "tilt", label: "View: tilt", min: -90, max: 90, step: 1, ...own("tilt") }),
  steps: control(element("step-controls"), { id: "steps", label: "Steps n", min: 1, max: 64, step: 1, ...own("steps") }),
};
const onlyIn3 = new Set(["height", "turn", "tilt"]);
const placeHandles = handles(element("picture"), state, change);
turning(element("picture"), state, () => update());

function sentence(layer) {
  const s = strength(layer);
  const left = percent(Math.abs(1 - s));
  return {
    identity: "Nothing is written: every state stays where it is, whatever k and v are.",
    "under-relaxed": `Every state moves ${percent(s)} of the way along k to the target. ${left} of the error stays.`,
    projection: "What the state held along k is erased and v is written in its place: no error stays. With v = 0 this is the projection onto what is orthogonal to k.",
    "over-relaxed": `Every state jumps past the target along k: the error turns its sign and ${left} of its size stays.`,
    reflection: "Every state is mirrored at the target: the error turns its sign and keeps its size. No length changes when v = 0.",
    unstable: `The step overshoots so far that the error grows to ${left} of its size: β‖k‖² is above 2.`,
  }[regime(layer)];
}

const numbers = (values, show = shown) => values.map((value) => html("span", { class: "number" }, show(value)));

function table(layers) {
  const layer = layers[state.selected];
  const [alone, all] = [dense(layer), product(layers)];
  const columns = layers.length > 1 ? [[[layer], alone], [layers, all]] : [[[layer], alone]];
  const names = { picked: `Layer ${state.selected + 1}`, all: `All ${layers.length} layers` };
  const row = (id, name, make) => html("tr", {}, html("th", { scope: "row" }, name), ...columns.map(([some, M], i) => html("td", { id: i ? `all-${id}` : id }, ...make(some, M))));
  const x = CLOUDS[state.dim][0];
  const before = error(layer, x);
  const law = (id, name, value) => html("tr", {}, html("th", { scope: "row" }, name), html("td", { id, colspan: columns.length }, ...numbers([value])));
  const head = columns.length > 1 ? [html("thead", {}, html("tr", {}, html("td"), html("th", { scope: "col" }, names.picked), html("th", { scope: "col" }, names.all)))] : [];
  element("numbers").replaceChildren(...head, html("tbody", {},
    row("eigenvalues", "Eigenvalues", (some, M) => numbers(eigenvalues(M), shownComplex)),
    row("determinant", "Determinant", (some) => numbers([determinant(some)])),
    row("lifted", `On V = ${state.channels} channels`, (some) => numbers([determinant(some, state.channels)])),
    row("singular", "Singular values", (some, M) => numbers(singularValues(M))),
    law("error-before", "e of one state", before),
    law("error-after", "e′ after layer " + (state.selected + 1), error(layer, rewrite(layer, x))),
    law("error-law", "(1 − β‖k‖²) e", (1 - strength(layer)) * before),
  ));
}

function layerButtons(layers) {
  const strip = element("layers");
  while (strip.children.length > layers.length) strip.lastChild.remove();
  while (strip.children.length < layers.length) {
    const i = strip.children.length;
    strip.append(html("button", { type: "button", id: `layer-${i + 1}`, on: { click: () => { state.selected = i; update(); } } }));
  }
  layers.forEach((layer, i) => {
    strip.children[i].textContent = `${i + 1}: β ${layer.beta.toFixed(2)}`;
    strip.children[i].setAttribute("aria-pressed", i === state.selected);
  });
  element("add").disabled = layers.length >= 6;
  element("remove").disabled = layers.length <= 1;
  element("earlier").disabled = state.selected === 0;
}

function update() {
  const layers = solved();
  const layer = layers[state.selected];
  const view = camera(state);
  for (const [name, show] of Object.entries(controls)) show(state.dim === 3 || !onlyIn3.has(name));
  const picture = element("picture");
  picture.querySelector(".scene")?.remove();
  const scene = svg("g", { class: "scene" });
  drawScene(scene, state, layers, view);
  picture.prepend(scene);
  placeHandles();
  picture.closest(".stage").classList.toggle("turnable", state.dim === 3);
  element("two").setAttribute("aria-pressed", state.dim === 2);
  element("three").setAttribute("aria-pressed", state.dim === 3);
  const name = regime(layer);
  const s = strength(layer);
  const unit = Math.abs(dot(layer.k, layer.k) - 1) < 1e-9 ? "" : ` (β‖k‖² = ${shown(s, 3)})`;
  element("sentence").replaceChildren(html("b", { id: "regime" }, `${name[0].toUpperCase()}${name.slice(1)}`), `${unit}. ${sentence(layer)}`);
  element("told").textContent = `The unit ${state.dim === 2 ? "circle" : "sphere"} and 36 states, before (dashed, hollow) and after ${layers.length === 1 ? "the layer" : `all ${layers.length} layers`} (filled). ${state.dim === 2 ? "" : "Drag the picture to turn it. "}Handles: k turns the direction, β slides where the direction is sent, v moves the target k·x = v.`;
  layerButtons(layers);
  table(layers);
  drawLaw(layer, CLOUDS[state.dim]);
  drawSpectrum(layers, eigenvalues(product(layers)));
  drawTime(layer, state.steps);
  const preset = PRESETS.find(({ id }) => id === state.preset);
  element("fact").textContent = preset ? preset.fact : "Your own setting. Choose a fact above to see it.";
  for (const button of element("presets").children) button.setAttribute("aria-pressed", button.id === `preset-${state.preset}`);
}

function choose(preset) {
  Object.assign(state, { dim: preset.dim, channels: preset.channels, steps: preset.steps, selected: preset.layers.length - 1, preset: preset.id });
  state.layers = preset.layers.map((layer) => ({ ...layer }));
  update();
}

function dimension(dim) {
  if (state.dim === dim) return;
  state.dim = dim;
  state.preset = null;
  update();
}
element("two").addEventListener("click", () => dimension(2));
element("three").addEventListener("click", () => dimension(3));
element("add").addEventListener("click", () => { state.layers.push(fresh()); state.selected = state.layers.length - 1; state.preset = null; update(); });
element("remove").addEventListener("click", () => { state.layers.splice(state.selected, 1); state.selected = Math.max(0, state.selected - 1); state.preset = null; update(); });
element("earlier").addEventListener("click", () => {
  const i = state.selected;
  [state.layers[i - 1], state.layers[i]] = [state.layers[i], state.layers[i - 1]];
  state.selected -= 1;
  state.preset = null;
  update();
});

let playing = 0;
function play() {
  if (playing) { clearInterval(playing); playing = 0; } else {
    change({ beta: 0 });
    playing = setInterval(() => {
      const next = Math.round(100 * state.layers[state.selected].beta + 1) / 100;
      if (next > 2) return play();
      return change({ beta: next });
    }, 30);
  }
  element("play").setAttribute("aria-pressed", Boolean(playing));
  element("play").textContent = playing ? "❚❚ Stop" : "▶ Move β from 0 to 2";
}
element("play").addEventListener("click", play);

// What the page computes of the presets against what DeltaOperator said when the page was written.
function difference() {
  let worst = 0;
  for (const preset of PRESETS) {
    const layers = preset.layers.map((layer) => ({ beta: layer.beta, v: layer.v, k: vector(preset.dim, layer) }));
    const M = product(layers);
    const ours = [...eigenvalues(M).flat(), ...singularValues(M), determinant(layers), determinant(layers, preset.channels)];
    const theirs = [...preset.eigenvalues.flat(), ...preset.singular_values, preset.determinant, preset.lifted];
    worst = Math.max(worst, ...ours.map((x, i) => Math.abs(x - theirs[i])));
  }
  return worst;
}

themed();
legend("picture-legend", [[dotMark("var(--before)", true), "a state before"], [dotMark("var(--after)"), "after"], [stroke("var(--k)"), "the line of k"], [stroke("var(--v)"), "k·x = v, what stays"]]);
legend("spectrum-legend", [[dotMark("var(--spectrum)"), "of all layers together"], [svg("path", { d: "M13 0V12", stroke: "var(--after)", "stroke-width": 2 }), "1 − β‖k‖² of each layer"], [stroke("var(--before)", { "stroke-dasharray": "4 4", "stroke-width": 1.5 }), "unit circle"]]);
element("presets").append(...PRESETS.map((preset) => html("button", { type: "button", id: `preset-${preset.id}`, on: { click: () => choose(preset) } }, preset.name)));
element("checked").textContent = `Computed in this page. On the ${PRESETS.length} facts its numbers differ from deepdelta.DeltaOperator ${embedded("data").version} by at most ${difference().toExponential(0)}.`;
choose(PRESETS.find(({ id }) => id === "over-relaxed"));
