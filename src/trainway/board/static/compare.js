/* Several runs over each other: curves, figures side by side, and the settings in which they differ. */

import { clock, count, duration, figure, made, secondsSoFar, stepText, swatch, trainLoss, value, write } from "./format.js";
import { CHARTS, ChartGrid, Curves, otherChart, otherMetrics } from "./curves.js";
import { costText } from "./list.js";

const FIGURES = [
  ["State", (run) => run.state],
  ["Step", stepText],
  ["Training loss", (run) => figure(run, trainLoss(run), "loss"), (run) => value(run, trainLoss(run)), Math.min],
  ["Validation loss", (run) => figure(run, "val/loss", "loss"), (run) => value(run, "val/loss"), Math.min],
  ["Bits per byte", (run) => figure(run, "val/bpb", "loss"), (run) => value(run, "val/bpb"), Math.min],
  ["Tokens/s", (run) => { const speed = value(run, "perf/tokens_per_s"); return speed === null ? "–" : count(Math.round(speed)); }, (run) => value(run, "perf/tokens_per_s"), Math.max],
  ["MFU", (run) => figure(run, "perf/mfu", "percent"), (run) => value(run, "perf/mfu"), Math.max],
  ["Memory, GiB", (run) => figure(run, "perf/memory_gib"), (run) => value(run, "perf/memory_gib"), Math.min],
  ["Time left", (run) => (run.seconds_left === null ? "–" : clock(run.seconds_left))],
  ["Time", (run, now) => { const seconds = secondsSoFar(run, now); return seconds === null ? "–" : duration(seconds); }],
  ["Cost", (run, now) => (run.cost ? costText(run, now).filter(Boolean).join(", ") : "–")],
];
const NEVER_DIFFER = new Set(["name", "run_dir", "runs_dir", "description"]);

export function compareView(board, place, ids) {
  const runs = ids.map((id) => ({ id, curves: new Curves(board, id), detail: { path: `/api/runs/${id}`, token: "" }, settings: null }));
  const toggles = made("div", { class: "runs", role: "group", "aria-label": "Runs shown" });
  const grid = made("div", { class: "charts" });
  const others = made("details", { hidden: true }, made("summary", {}, "More figures"));
  const otherGrid = made("div", { class: "charts inside" });
  others.append(otherGrid);
  const figures = made("div", { class: "scroll" });
  const differences = made("div");
  place.append(
    made("p", { class: "crumb" }, made("a", { href: "#/" }, "← All runs")),
    made("h1", {}, `${ids.length} runs compared`), toggles, grid, others,
    made("h2", {}, "Figures"), figures, differences,
  );
  const charts = new ChartGrid(grid);
  const otherCharts = new ChartGrid(otherGrid);
  const hidden = new Set();
  let named = "";
  let lastFigures = "";
  others.addEventListener("toggle", drawOthers);
  document.title = "Runs compared · Trainway board";

  const known = () => runs.filter((one) => board.runs.has(one.id));
  const nameOf = (one) => {
    const run = board.runs.get(one.id);
    const twice = known().some((other) => other !== one && board.runs.get(other.id).name === run.name);
    return twice && run.folder ? `${run.folder}/${run.name}` : run.name;
  };

  async function update() {
    showToggles();
    let grown = false;
    for (const one of known()) grown = (await one.curves.update().catch(passOver)) || grown;
    if (grown) draw();
    let other = false;
    for (const one of known()) {
      const found = one.settings ? null : await board.ask(one.detail).catch(passOver);
      if (found) {
        one.settings = found.settings;
        other = true;
      }
    }
    showFigures();
    if (other) showDifferences();
  }

  function showToggles() {
    const names = known().map(nameOf);
    if (names.join("\n") === named) return;
    named = names.join("\n");
    toggles.replaceChildren(...known().map((one) => {
      const i = runs.indexOf(one);
      const button = made("button", { type: "button", class: "toggle", "aria-pressed": String(!hidden.has(i)), onclick: () => {
        const on = hidden.has(i);
        if (on) hidden.delete(i);
        else hidden.add(i);
        button.setAttribute("aria-pressed", String(on));
        charts.setRun(i, on);
        otherCharts.setRun(i, on);
      } }, swatch({ colour: i }), made("span", {}, nameOf(one)));
      return button;
    }));
  }

  /* One metric a chart: colours are the runs'. */
  const specs = CHARTS.flatMap((chart) => chart.lines.map((line, i) => ({
    ...chart, lines: [line], legend: false,
    title: line.title || (chart.lines.length > 1 ? `${chart.title}, ${line.label}` : chart.title),
  })));
  const linesOf = (spec) => known().filter((one) => one.curves.found.has(spec.lines[0].metric)).map((one) => ({
    label: nameOf(one), colour: runs.indexOf(one), run: runs.indexOf(one), points: spec.lines[0].points, ...one.curves.found.get(spec.lines[0].metric),
  }));

  function draw() {
    charts.show(specs, linesOf);
    drawOthers();
    for (const i of hidden) charts.setRun(i, false);
  }

  function drawOthers() {
    const names = otherMetrics(new Set(known().flatMap((one) => [...one.curves.found.keys()])));
    others.hidden = !names.length;
    if (others.open) otherCharts.show(names.map((name) => ({ ...otherChart(name), legend: false })), linesOf);
  }

  const heads = () => known().map((one) => made("th", { scope: "col" }, swatch({ colour: runs.indexOf(one) }), made("a", { class: "name", href: `#/run/${one.id}` }, nameOf(one))));

  function showFigures() {
    const now = board.now();
    const found = known().map((one) => board.runs.get(one.id));
    const rows = FIGURES.map(([label, text, number, better]) => {
      const texts = found.map((run) => text(run, now));
      const numbers = number ? found.map(number).filter((one) => one !== null) : [];
      const best = numbers.length > 1 ? better(...numbers) : null;
      return [label, texts, found.map((run) => best !== null && number(run) === best && numbers.some((one) => one !== best))];
    }).filter(([, texts]) => texts.some((text) => text !== "–"));
    const signature = JSON.stringify([named, rows]);
    if (signature === lastFigures) return;
    lastFigures = signature;
    figures.replaceChildren(made("table", { class: "figures-table" },
      made("thead", {}, made("tr", {}, made("th", {}, ""), ...heads())),
      made("tbody", {}, ...rows.map(([label, texts, bests]) => made("tr", {}, made("th", { scope: "row" }, label),
        ...texts.map((text, i) => made("td", { class: bests[i] ? "best-value" : null }, text)))))));
  }

  function showDifferences() {
    const told = known().filter((one) => one.settings);
    if (told.length < 2) return;
    const keys = [...new Set(told.flatMap((one) => Object.keys(one.settings)))].filter((key) => !NEVER_DIFFER.has(key));
    const rows = keys.map((key) => [key, told.map((one) => one.settings[key] ?? "")]).filter(([, values]) => new Set(values).size > 1);
    const same = keys.length - rows.length;
    differences.replaceChildren(made("h2", {}, "Differences"),
      rows.length
        ? made("div", { class: "scroll" }, made("table", { class: "settings-table" },
          made("thead", {}, made("tr", {}, made("th", {}, "Setting"), ...told.map((one) => made("th", { scope: "col" }, nameOf(one))))),
          made("tbody", {}, ...rows.map(([key, values]) => made("tr", {}, made("th", { scope: "row" }, key), ...values.map((text) => made("td", {}, text || "–")))))))
        : made("p", { class: "soft" }, "None: all settings that matter are the same."),
      rows.length ? made("p", { class: "soft" }, `${same} other settings are the same.`) : "");
  }

  return {
    update,
    destroy() {
      charts.destroy();
      otherCharts.destroy();
    },
  };
}

/* One run that is gone does not hide the others. */
function passOver(error) {
  if (error.status !== 404) throw error;
  return null;
}
