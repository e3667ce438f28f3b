"use strict";
const touch = !window.matchMedia("(hover: hover)").matches;
for (const source of document.querySelectorAll("script[data-plot]")) {
  const figure = JSON.parse(source.textContent);
  figure.layout.dragmode = touch ? false : "zoom"; // a finger on a picture scrolls the page
  Plotly.newPlot(source.dataset.plot, figure.data, figure.layout, { displayModeBar: false, responsive: true });
}
// A condition's button shows or hides its lines in all pictures of losses.
for (const button of document.querySelectorAll("button[data-trace]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const plot of document.querySelectorAll(".grid .plot")) {
      const lines = plot.data.flatMap((trace, index) => (trace.meta === Number(button.dataset.trace) ? [index] : []));
      if (lines.length) Plotly.restyle(plot, { visible: shown }, lines);
    }
  });
}
