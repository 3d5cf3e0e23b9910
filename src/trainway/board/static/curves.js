/* The curves of a run, of which only what is new is asked for, and the charts that they are drawn in. */

const LINES = (pairs) => pairs.map(([metric, label, more]) => ({ metric, label, ...more }));

/* Charts in their order; what no chart names gets one of its own after them. */
export const CHARTS = [
  { title: "Loss", unit: "nats per token", wide: true, log: true, lines: LINES([["train/loss", "training", { faint: true, title: "Training loss" }], ["val/loss", "validation", { points: true, title: "Validation loss" }]]) },
  { title: "Student's loss", wide: true, lines: LINES([["train/student_loss", "student"]]) },
  { title: "Bits per byte", unit: "validation", lines: LINES([["val/bpb", "validation", { points: true }]]) },
  { title: "Discriminator's margin", lines: LINES([["gad/margin", "margin"]]) },
  { title: "Discriminator's accuracy", kind: "percent", lines: LINES([["gad/discriminator_accuracy", "training"], ["val/discriminator_accuracy", "validation", { points: true }]]) },
  { title: "Length of answers", unit: "tokens", zero: true, lines: LINES([["gad/response_length", "student"], ["gad/teacher_length", "teacher"]]) },
  { title: "ROUGE-L", unit: "validation", lines: LINES([["val/rouge_l", "validation", { points: true }]]) },
  { title: "Gradient norm", log: true, lines: LINES([["optim/grad_norm", "norm"]]) },
  { title: "Learning rate", zero: true, lines: LINES([["optim/lr", "learning rate"]]) },
  { title: "Speed", unit: "tokens per second", zero: true, lines: LINES([["perf/tokens_per_s", "speed"]]) },
  { title: "MFU", unit: "of the device's peak", kind: "percent", zero: true, lines: LINES([["perf/mfu", "MFU"]]) },
  { title: "GPU at work", unit: "share of the time", kind: "percent", zero: true, lines: LINES([["perf/gpu_utilization", "GPU"]]) },
  { title: "Memory", unit: "GiB, highest so far", zero: true, lines: LINES([["perf/memory_gib", "memory"]]) },
  { title: "Seconds per step", zero: true, lines: LINES([["perf/step_s", "step"]]) },
];
const KNOWN = new Set(CHARTS.flatMap((chart) => chart.lines.map((line) => line.metric)));
const LEFT_OUT = new Set(["train/tokens", "val/tokens", "val/ppl"]);
const MOST_OTHERS = 40;

export const otherMetrics = (names) =>
  [...names].filter((name) => !KNOWN.has(name) && !LEFT_OUT.has(name)).sort().slice(0, MOST_OTHERS);

export const otherChart = (metric) => ({ title: metric, lines: [{ metric, label: metric }] });

/* The series of one run. */
export class Curves {
  constructor(board, id) {
    this.board = board;
    this.source = { path: `/api/runs/${id}/series`, token: "" };
    this.id = id;
    this.found = new Map();
    this.due = 0;
    this.step = -1;
    this.pending = false; // a long record is still being read
  }

  /* Asks again when enough steps were made to be seen on a screen; true when there is something new. */
  async update() {
    const run = this.board.runs.get(this.id);
    const moved = run && `${run.step} ${run.changed} ${run.state}`;
    if (moved === this.step || Date.now() < this.due) return false;
    const started = performance.now();
    const found = await this.board.ask(this.source);
    this.step = moved;
    // a four-hundredth of the run is a pixel or two; and a server that had to read long is not asked at once
    const pixel = run ? ((run.step_s || 0) * run.step) / 400 : 2;
    this.due = Date.now() + Math.max(Math.min(30, Math.max(1.5, pixel)) * 1000, 10 * (performance.now() - started));
    this.pending = Boolean(found && found.pending);
    if (this.pending) {
      this.step = -1;
      this.due = Date.now() + 1000;
    }
    if (!found || found.pending) return false;
    if (found.whole) this.found.clear();
    for (const name of found.gone || []) this.found.delete(name);
    for (const [name, { at, ...curve }] of Object.entries(found.curves)) {
      const old = at ? this.found.get(name) : null;
      this.found.set(name, old ? Object.fromEntries(Object.entries(curve).map(([key, values]) => [key, old[key].slice(0, at).concat(values)])) : curve);
    }
    return true;
  }
}

/* Charts in a grid, made as soon as there is something to draw in them. */
export class ChartGrid {
  constructor(parent) {
    this.parent = parent;
    this.charts = new Map();
  }

  /* `linesOf(spec)`: the lines of a chart, none when it has nothing to show. */
  show(specs, linesOf) {
    const shown = specs.map((spec) => [spec, linesOf(spec)]).filter(([, lines]) => lines.length);
    const wanted = new Set(shown.map(([spec]) => spec.title));
    for (const [title, { chart, cell }] of this.charts)
      if (!wanted.has(title)) {
        chart.destroy();
        cell.remove();
        this.charts.delete(title);
      }
    shown.forEach(([spec, lines], i) => {
      const known = this.charts.get(spec.title);
      if (known) return void known.chart.setLines(lines);
      const cell = document.createElement("div");
      if (spec.wide) cell.className = "wide";
      this.parent.insertBefore(cell, this.parent.children[i] || null);
      this.charts.set(spec.title, { cell, chart: TrainwayCharts.draw(cell, { ...spec, lines }) });
    });
  }

  setRun(run, on) {
    for (const { chart } of this.charts.values()) chart.setRun(run, on);
  }

  destroy() {
    for (const { chart } of this.charts.values()) chart.destroy();
  }
}
