"use strict";
// Which token and which rewrite are looked at, and what each run says of them.

const DATA = embedded("data");
const RUNS = DATA.runs;
const IDS = RUNS[0].ids;
const LAST = Math.max(...RUNS.map((run) => run.rewrites.length));
const state = { token: Math.max(0, IDS.length - 2), step: 1 };

const spelled = (text) => (text === "" ? "∅" : text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
// Bytes that are no character of their own are shown as their number.
const textOf = (run, id) => (run.texts[id] === "\ufffd" ? `#${id}` : spelled(run.texts[id]));
const share = (p) => (p < 0.0995 ? `${(100 * p).toFixed(1)} %` : `${Math.round(100 * p)} %`);
const list = (values) => values.map((x) => shown(x, 3)).join(", ");

function gateSentence(rewrite, token) {
  const [beta, erase, size] = [rewrite.beta?.[token], rewrite.erase?.[token], rewrite.norm[token]];
  if (!beta && !erase) return "This rule has no gate: it adds what its branch says.";
  const gates = beta ?? erase;
  const said = `${gates.length > 1 ? "Gates" : "Gate"} ${list(gates)}`;
  if (!erase) return `${said}: nothing is erased, the write is added to what stands along k.`;
  const s = erase[0] * size * size;
  if (erase.length > 1) return `${said}, one per value channel.`;
  const does = s < 0.005 ? "the state is left almost as it is" : s < 0.995 ? `${percent(s)} of what stands along k is replaced` : s <= 1.005 ? "what stands along k is replaced" : `the state jumps past the target, and ${percent(Math.abs(1 - s))} of the error stays with its sign turned`;
  const differs = rewrite.beta && Math.abs(erase[0] - beta[0]) > 1e-9 ? ` Erasing has a gate of its own, ${shown(erase[0], 3)}.` : "";
  return `${said}: ${does}.${differs}`;
}

function lensList(run, entry, title, next) {
  const rows = entry.top.map(([id, p]) => html("li", {}, html("code", next === id ? { class: "right" } : {}, textOf(run, id)), html("span", { class: "bar", style: `width:${(100 * p).toFixed(1)}%` }), html("span", {}, share(p))));
  return html("div", {}, html("b", {}, title), html("ol", { "aria-label": `${title}: the likeliest next tokens` }, ...rows));
}

function lensSentence(run, before, after, next) {
  if (next === undefined) {
    const [[a], [b]] = [before.top[0], after.top[0]];
    return a === b ? `The guess for what follows stays “${textOf(run, b)}”.` : `The guess for what follows changes from “${textOf(run, a)}” to “${textOf(run, b)}”.`;
  }
  return `The prompt goes on with “${textOf(run, next)}”: ${share(before.next[0])} before, ${share(after.next[0])} after; place ${before.next[1]} before, ${after.next[1]} after.`;
}

function records(rewrite, token) {
  const values = (name) => rewrite[name]?.[token];
  const after = values("read").map((x, j) => x + rewrite.norm[token] ** 2 * (values("written")[j] - (values("erased")?.[j] ?? 0)));
  const rows = [["read kᵀX", values("read")], ["target v", values("target")], ["erased", values("erased")], ["written", values("written")], ["kᵀX′ after", after], ["cos(k, X)", values("cosine")], ["‖X‖ before", values("state_norm")], ["‖X′‖ after", values("state_norm_after")]];
  const table = html("table", { class: "records" },
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "channel"), ...after.map((_, j) => html("th", { scope: "col" }, String(j + 1))))),
    html("tbody", {}, ...rows.filter(([, numbers]) => numbers).map(([title, numbers]) => html("tr", {}, html("th", { scope: "row" }, title), ...numbers.map((x) => html("td", {}, shown(x, 4)))))));
  return { after, table };
}

function article(r) {
  const run = RUNS[r];
  const step = Math.min(state.step, run.rewrites.length);
  const rewrite = run.rewrites[step - 1];
  const { after, table } = records(rewrite, state.token);
  const next = IDS[state.token + 1];
  const [lensBefore, lensAfter] = [run.lens[step - 1][state.token], run.lens[step][state.token]];
  const marks = [[dotMark("var(--before)", true), "before"], [dotMark("var(--after)"), "after"]];
  if (rewrite.target) marks.push([svg("path", { d: "M13 0V12", stroke: "var(--v)", "stroke-width": 3 }), "target"]);
  element(`run-${r}`).replaceChildren(
    html("h2", {}, run.name), html("p", { class: "soft" }, `${run.what}. Rewrite ${step} of ${run.rewrites.length}: ${rewrite.name}.`),
    html("p", { class: "fact", id: `says-${r}` }, gateSentence(rewrite, state.token)),
    html("div", { class: "inner" },
      html("div", {}, html("h3", {}, "This rewrite, along k"), rewritePicture(r, { read: rewrite.read[state.token], after, target: rewrite.target?.[state.token] }),
        html("ul", { class: "legend", id: `marks-${r}` }),
        html("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": `Numbers of the rewrite, ${run.name}` }, table),
        html("h3", {}, "What the model would say next"), html("p", { class: "soft" }, lensSentence(run, lensBefore, lensAfter, next)),
        html("div", { class: "lens" }, lensList(run, lensBefore, "Before", next), lensList(run, lensAfter, "After", next))),
      html("div", {}, html("h3", {}, "This token, over depth"), ...depthPictures(r, run, state.token, step, (to) => go(to, state.token)))));
  legend(`marks-${r}`, marks);
}

function go(step, token) {
  state.step = Math.min(LAST, Math.max(1, step));
  state.token = Math.min(IDS.length - 1, Math.max(0, token));
  const name = RUNS.find((run) => run.rewrites.length >= state.step).rewrites[state.step - 1].name;
  element("where").textContent = `Token ${state.token + 1} of ${IDS.length}, “${textOf(RUNS[0], IDS[state.token])}”: rewrite ${state.step} of ${LAST}, ${name}`;
  element("step").value = state.step;
  element("back").disabled = state.step === 1;
  element("on").disabled = state.step === LAST;
  [...element("tokens").children].forEach((button, i) => {
    if (i === state.token) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  const [box, chip] = [element("tokens"), element("tokens").children[state.token]];
  const place = chip.offsetTop - box.offsetTop;
  if (place < box.scrollTop || place + chip.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = place - box.clientHeight / 2;
  RUNS.forEach((_, r) => article(r));
}

themed();
element("step").max = LAST;
element("step").addEventListener("input", (event) => go(Number(event.target.value), state.token));
element("back").addEventListener("click", () => go(state.step - 1, state.token));
element("on").addEventListener("click", () => go(state.step + 1, state.token));
element("tokens").append(...IDS.map((id, i) => html("button", { type: "button", on: { click: () => go(state.step, i) }, "aria-label": `Token ${i + 1}: ${textOf(RUNS[0], id)}` }, textOf(RUNS[0], id))));
element("runs").append(...RUNS.map((_, r) => html("section", { class: "run", id: `run-${r}` })));
element("runs").classList.toggle("two", RUNS.length > 1);
document.addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by || event.ctrlKey || event.altKey || event.metaKey || (event.target.id === "step" && !event.shiftKey)) return;
  event.preventDefault();
  go(state.step + (event.shiftKey ? 0 : by), state.token + (event.shiftKey ? by : 0));
});
element("foot").textContent = `The numbers are those of deepdelta.recording (version ${DATA.version}); the same lie beside this page as JSON. The guesses are the model's own way out, taken from the state before and after the rewrite.`;
go(1, state.token);
