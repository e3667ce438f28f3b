"use strict";
// Pictures with their tools: zoom, keys, a table of what is drawn, and both as files. Text enters as text, never as markup.
const touch = !window.matchMedia("(hover: hover)").matches;

function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
// Names are escaped for plotly, which reads tags in texts. A parsed document runs nothing.
const plain = (text) => new DOMParser().parseFromString(String(text), "text/html").body.textContent;
const shown = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : (value ?? ""));
const ornament = (trace) => trace.meta?.ornament === true;

// A column's title, and its cells by point; of a heat map a point is a row and a column.
function columnsOf(trace, layout) {
  const across = layout.xaxis.title.text;
  const up = layout.yaxis.title?.text ?? layout.meta?.rows ?? "y";
  if (trace.type === "heatmap") {
    const points = trace.z.flatMap((row, i) => row.map((_, j) => [i, j]));
    return { points, cells: { [up]: ([i]) => trace.y[i], [across]: ([, j]) => trace.x0 + j * trace.dx, [trace.name]: ([i, j]) => trace.z[i][j] } };
  }
  const points = trace.y.map((_, i) => i);
  const at = (values) => (i) => values[i];
  if (trace.type === "box") {
    const parts = { "5 %": "lowerfence", "25 %": "q1", median: "median", "75 %": "q3", "95 %": "upperfence", mean: "mean" };
    return { points, cells: { [up]: at(trace.y), ...Object.fromEntries(Object.entries(parts).map(([title, key]) => [title, at(trace[key])])) } };
  }
  const cells = { [up]: at(trace.y), [across]: at(trace.x) };
  if (trace.name) cells.series = () => trace.name;
  if (trace.meta?.seed) cells.seed = () => trace.meta.seed;
  if (trace.text) cells.run = at(trace.text);
  for (const [key, title] of layout.meta?.axes ?? []) cells[title] = at(trace.meta.x[key]);
  if (trace.error_x?.array) {
    cells["95 % from"] = (i) => trace.x[i] - (trace.error_x.arrayminus ?? trace.error_x.array)[i];
    cells["95 % to"] = (i) => trace.x[i] + trace.error_x.array[i];
  }
  return { points, cells };
}

function tableOf(plot) {
  const traces = plot.data.filter((trace) => !ornament(trace)).map((trace) => columnsOf(trace, plot.layout));
  const found = new Set(traces.flatMap(({ cells }) => Object.keys(cells)));
  const first = ["series", "seed", "comparison", "sublayer", "run"].filter((title) => found.delete(title));
  const titles = [...first, ...found];
  const rows = traces.flatMap(({ points, cells }) => points.map((point) => titles.map((title) => cells[title]?.(point))));
  return { titles: titles.map(plain), rows: rows.map((row) => row.map((cell) => (typeof cell === "string" ? plain(cell) : shown(cell)))) };
}

function save(name, type, text) {
  const link = html("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveTable(plot) {
  const { titles, rows } = tableOf(plot);
  const cell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  save(`${plot.id}.csv`, "text/csv", [titles, ...rows].map((row) => row.map(cell).join(",") + "\r\n").join(""));
}

// On white, as in a paper: the page's own colours follow light and dark, a file cannot.
async function savePicture(plot) {
  const layout = { ...plot.layout, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", font: { ...plot.layout.font, color: "#1a1f27" } };
  const size = { width: plot.clientWidth, height: plot.clientHeight };
  const url = await Plotly.toImage({ data: plot.data, layout }, { format: "svg", ...size });
  save(`${plot.id}.svg`, "image/svg+xml", decodeURIComponent(url.slice(url.indexOf(",") + 1)));
}

function zoom(plot, factor) {
  const changes = {};
  for (const name of ["xaxis", "yaxis"]) {
    const axis = plot._fullLayout[name];
    if (axis.fixedrange) continue;
    const [low, high] = axis.range;
    const [middle, half] = [(low + high) / 2, ((high - low) / 2) * factor];
    changes[`${name}.range`] = [middle - half, middle + half];
  }
  Plotly.relayout(plot, changes);
}

// The arrow keys go from point to point and from line to line; what stands there is said below the picture.
function keys(plot, reading, whole) {
  const lines = () => plot.data.flatMap((trace, index) => (ornament(trace) || trace.hoverinfo === "skip" || trace.visible === false ? [] : [index]));
  let [line, point] = [0, -1];
  function go(along, between) {
    const there = lines();
    if (!there.length) return;
    line = (line + between + there.length) % there.length;
    const trace = plot.data[there[line]];
    const { points, cells } = columnsOf(trace, plot.layout);
    point = Math.min(points.length - 1, Math.max(0, point + along));
    reading.textContent = Object.entries(cells).map(([title, say]) => `${plain(title)}: ${plain(shown(say(points[point])))}`).join(", ");
    Plotly.Fx.hover(plot, [{ curveNumber: there[line], pointNumber: points[point] }]);
  }
  const actions = { ArrowRight: () => go(1, 0), ArrowLeft: () => go(-1, 0), ArrowDown: () => go(0, 1), ArrowUp: () => go(0, -1), "+": () => zoom(plot, 0.7), "-": () => zoom(plot, 1 / 0.7), 0: whole };
  plot.addEventListener("keydown", (event) => {
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    action();
  });
  plot.addEventListener("blur", () => { Plotly.Fx.unhover(plot); reading.textContent = ""; });
}

function tools(plot, initial) {
  const title = plot.dataset.title;
  const whole = () => Plotly.relayout(plot, initial);
  const reading = html("p", { class: "reading", "aria-live": "polite" });
  const place = html("div", { class: "scroll data", tabindex: 0, role: "group", "aria-label": `Data of: ${title}`, hidden: "" });
  const button = (text, says, action) => {
    const made = html("button", { type: "button", "aria-label": `${text}: ${says}, ${title}`, title: says }, text);
    made.addEventListener("click", () => action(made));
    return made;
  };
  function fill(toggle) {
    place.hidden = !place.hidden;
    toggle.setAttribute("aria-expanded", String(!place.hidden));
    if (place.hidden) return;
    const { titles, rows } = tableOf(plot);
    place.replaceChildren(html("table", {}, html("thead", {}, html("tr", {}, ...titles.map((text) => html("th", { scope: "col" }, text)))),
      html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map((text, i) => html("td", { "data-title": titles[i] }, text)))))));
  }
  const table = button("Table", "What is drawn, as a table", fill);
  table.setAttribute("aria-expanded", "false");
  plot.parentElement.append(reading, html("div", { class: "tools" },
    button("+", "Zoom in", () => zoom(plot, 0.7)), button("−", "Zoom out", () => zoom(plot, 1 / 0.7)), button("Reset", "As it was", whole),
    table, button("SVG", "Save the picture", () => savePicture(plot)), button("CSV", "Save the data", () => saveTable(plot))), place);
  plot.tabIndex = 0;
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "picture");
  plot.setAttribute("aria-describedby", "keys");
  keys(plot, reading, whole);
}

for (const source of document.querySelectorAll("script[data-plot]")) {
  const figure = JSON.parse(source.textContent);
  const plot = document.getElementById(source.dataset.plot);
  figure.layout.dragmode = touch ? false : "zoom"; // a finger on a picture scrolls the page
  const [[first]] = figure.layout.meta?.axes ?? [[]];
  if (first) for (const trace of figure.data) trace.meta.x[first] = trace.x;
  Plotly.newPlot(plot, figure.data, figure.layout, { displayModeBar: false, responsive: true }).then(() => {
    const initial = {};
    for (const name of ["xaxis", "yaxis"]) {
      const range = figure.layout[name].autorange === false || figure.layout[name].range ? plot._fullLayout[name].range.slice() : null;
      initial[range ? `${name}.range` : `${name}.autorange`] = range ?? true;
    }
    tools(plot, initial);
  });
}

const pressed = (group, button) => { for (const one of group) one.setAttribute("aria-pressed", String(one === button)); };

// A condition's button shows or hides its lines in all pictures.
for (const button of document.querySelectorAll("button[data-condition]")) {
  button.addEventListener("click", () => {
    const visible = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(visible));
    for (const plot of document.querySelectorAll(".plot")) {
      const lines = plot.data.flatMap((trace, index) => (trace.meta?.condition === Number(button.dataset.condition) ? [index] : []));
      if (lines.length) Plotly.restyle(plot, { visible }, lines);
    }
  });
}
// What the curves lie against.
const switches = document.querySelectorAll("button[data-axis]");
for (const button of switches) {
  button.addEventListener("click", () => {
    pressed(switches, button);
    const plot = document.getElementById("curves");
    const axis = button.dataset.axis;
    Plotly.update(plot, { x: plot.data.map((trace) => trace.meta.x[axis]) }, { "xaxis.title.text": button.textContent, "xaxis.autorange": true });
  });
}
