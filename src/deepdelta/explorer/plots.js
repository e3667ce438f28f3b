"use strict";
// The error law, the spectrum in the complex plane, and the depth ODE beside the finite step.

function drawLaw(layer, points) {
  const [target, s] = [element("law"), strength(layer)];
  const { line, px, py, drawing } = axes(target, { x: [-2, 2], y: [-2, 2], ticksX: [-2, -1, 0, 1, 2], ticksY: [-2, -1, 0, 1, 2], labelX: "e before", labelY: "e after" });
  for (const slope of [1, -1]) line([[-2, -2 * slope], [2, 2 * slope]], { stroke: "var(--before)", "stroke-dasharray": "4 5", "stroke-width": 1.4 });
  line([[-2, -2 * (1 - s)], [2, 2 * (1 - s)]], { stroke: "var(--after)", "stroke-width": 2 });
  for (const x of points) drawing.append(svg("circle", { cx: px(error(layer, x)), cy: py(error(layer, rewrite(layer, x))), r: 3.6, fill: "var(--after)", "fill-opacity": 0.75 }));
  target.setAttribute("aria-label", `Error after against error before: all states on a line of slope ${shown(1 - s, 3)}. Dashed: slopes 1, the identity, and −1, the reflection.`);
}

function drawSpectrum(layers, values) {
  const target = element("spectrum");
  const limit = Math.max(1.35, 1.12 * Math.max(...values.map(norm), ...layers.map((layer) => Math.abs(1 - strength(layer)))));
  const range = [-limit, limit];
  const { line, px, py, drawing } = axes(target, { x: range, y: range, ticksX: ticks(limit), ticksY: ticks(limit), labelX: "real part", labelY: "imaginary part" });
  line(Array.from({ length: 97 }, (_, i) => [Math.cos((i * Math.PI) / 48), Math.sin((i * Math.PI) / 48)]), { stroke: "var(--before)", "stroke-dasharray": "4 5", "stroke-width": 1.4 });
  for (const layer of layers) drawing.append(svg("path", { d: `M${px(1 - strength(layer))} ${py(0) - 9}v18`, stroke: "var(--after)", "stroke-width": 2 }));
  for (const [re, im] of values) {
    line([[0, 0], [re, im]], { stroke: "var(--spectrum)", "stroke-width": 1.2, opacity: 0.6 });
    drawing.append(svg("circle", { cx: px(re), cy: py(im), r: 6, fill: "var(--spectrum)", stroke: "var(--card)", "stroke-width": 1.5 }));
  }
  target.setAttribute("aria-label", `Eigenvalues of all layers together: ${values.map(shownComplex).join(", ")}. Dashed: the unit circle.`);
}

function drawTime(layer, steps) {
  const s = strength(layer);
  for (const id of ["path", "refinement"]) element(id).setAttribute("viewBox", `0 0 ${across()} ${across() === 340 ? 230 : 270}`);
  const step = refined(s, steps);
  const low = Math.max(-4, Math.min(-1.1, 1.08 * (1 - s), 1.08 * (1 - s / steps)));
  const euler = Array.from({ length: steps + 1 }, (_, i) => [i / steps, (1 - s / steps) ** i]);
  const smooth = (at, end) => Array.from({ length: 61 }, (_, i) => [(end * i) / 60, at((end * i) / 60)]);
  const ticksY = ticks(-low).filter((t) => t <= 1);
  let plot = axes(element("path"), { x: [-0.02, 1.02], y: [low, 1.1], ticksX: [0, 0.25, 0.5, 0.75, 1], ticksY, labelX: "time t", labelY: "error, as a share" });
  plot.line([[0, 1], [1, 1 - s]], { stroke: "var(--after)", "stroke-width": 2.5 });
  plot.line(smooth((t) => flow(s * t), 1), { stroke: "var(--v)", "stroke-width": 2.5, "stroke-dasharray": "7 4" });
  plot.line(euler, { stroke: "var(--k)", "stroke-width": 1.8 });
  for (const [t, e] of euler) plot.drawing.append(svg("circle", { cx: plot.px(t), cy: plot.py(e), r: steps > 24 ? 2 : 3.4, fill: "var(--k)" }));
  element("path").setAttribute("aria-label", `The error on its way from time 0 to 1: one step ends at ${shown(1 - s, 4)}, ${steps} steps at ${shown(step, 4)}, the flow at ${shown(flow(s), 4)}.`);
  const end = Math.max(2, s);
  plot = axes(element("refinement"), { x: [-0.02 * end, 1.02 * end], y: [Math.min(-1.1, 1.08 * (1 - end)), 1.1], ticksX: end > 2 ? [0, 1, 2, 3, 4].filter((t) => t <= end) : [0, 0.5, 1, 1.5, 2], ticksY: ticks(Math.max(1.1, end - 1)).filter((t) => t <= 1), labelX: "β‖k‖²", labelY: "factor at time 1" });
  plot.line([[0, 1], [end, 1 - end]], { stroke: "var(--after)", "stroke-width": 2.5 });
  plot.line(smooth(flow, end), { stroke: "var(--v)", "stroke-width": 2.5, "stroke-dasharray": "7 4" });
  plot.line(smooth((at) => refined(at, steps), end), { stroke: "var(--k)", "stroke-width": 1.8 });
  for (const [value, colour] of [[1 - s, "--after"], [step, "--k"], [flow(s), "--v"]]) plot.drawing.append(svg("circle", { cx: plot.px(s), cy: plot.py(value), r: 5, fill: `var(${colour})`, stroke: "var(--card)", "stroke-width": 1.5 }));
  element("refinement").setAttribute("aria-label", "The factor on the error at time 1 against the strength: one step falls on a straight line through 0 to −1; the flow stays above 0.");
  legend("time-legend", [[stroke("var(--after)"), "one step of size 1"], [stroke("var(--k)"), steps === 1 ? "1 step" : `${steps} steps of size 1/${steps}`], [stroke("var(--v)", { "stroke-dasharray": "7 4" }), "the flow, endlessly many"]]);
  const lost = { identity: "At 0 nothing moves, in one step or in many.", projection: "One step projects: the error is gone. No flow does that.", reflection: "One step reflects: the error turns its sign and keeps its size. No flow does that.", "over-relaxed": "One step turns the sign of the error. No flow does that.", unstable: "One step makes the error larger. The flow always shrinks it.", "under-relaxed": "Here all of them shrink the error and keep its sign." }[regime(layer)];
  const many = steps === 1 ? "" : `, ${steps} steps by `;
  element("refined").replaceChildren("One step multiplies the error by ", html("b", { id: "factor-one" }, shown(1 - s)), many, steps === 1 ? "" : html("b", { id: "factor-many" }, shown(step)), ", the flow by ", html("b", { id: "factor-flow" }, shown(flow(s))), `. ${lost}`);
}
