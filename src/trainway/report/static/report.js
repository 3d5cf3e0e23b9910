/* Draws the charts of a report from the data within it, and lets its reader choose among its runs. */
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = [];
  const span = [0, Math.max(1, ...data.steps.map((steps) => steps[steps.length - 1]))];

  function linesOf(chart) {
    return chart.lines.map((line) => {
      const found = data.series[line.series];
      return { ...line, ...found, steps: data.steps[found.steps] };
    });
  }

  for (const chart of data.charts) {
    const parent = document.querySelector(`.charts[data-section="${chart.section}"]`);
    const drawn = TrainwayCharts.draw(parent, { ...chart, span, legend: data.runs.length < 2, lines: linesOf(chart) });
    if (chart.wide) drawn.plot.parentElement.classList.add("wide");
    charts.push(drawn);
  }

  for (const toggle of document.querySelectorAll(".toggle[data-run]")) {
    const run = Number(toggle.dataset.run);
    toggle.querySelector(".swatch").style.setProperty("--swatch", `var(--series-${run % 8})`);
    toggle.addEventListener("click", () => {
      const on = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(on));
      for (const chart of charts) chart.setRun(run, on);
    });
  }
})();
