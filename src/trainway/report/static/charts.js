/* Line charts of a run's metrics, shared by the report and the board; uPlot must be loaded before.
 *
 *   const chart = TrainwayCharts.draw(parent, {
 *     title: "Loss", unit: "nats per token",
 *     kind: "number",      // or "percent" (of shares from 0 to 1)
 *     zero: true,          // the value axis begins at 0
 *     log: true,           // offer a logarithmic value axis
 *     span: [0, 400000],   // steps that the axis shows at least, so that charts below each other agree
 *     group: "steps",      // charts of a group share cursor and zoom; "steps" unless told
 *     lines: [{label, colour: 0..7, steps, mean, low, high, run: 0, faint: true, points: true, hidden: true}],
 *     marks: [{label: "planned", value: 12.5}],      // horizontal lines
 *   });
 *   chart.setLines(lines); chart.setRun(run, on); chart.destroy();
 *
 * `low` and `high` draw a band, and may be absent; null is a gap. A chart is a <figure> of its own in `parent`. Drag to
 * zoom, double-click or Escape to see all again, arrow keys to walk. Colours are style.css's, in light and dark. Text
 * reaches the page as text only.
 */
"use strict";

const TrainwayCharts = (() => {
  const alive = new Set();
  let palette = null;

  function draw(parent, spec) {
    const figure = element("figure", "chart");
    const head = element("figcaption", "chart-head");
    const title = element("span", "chart-title", spec.title);
    if (spec.unit) title.append(element("span", "chart-unit", spec.unit));
    const legend = element("span", "chart-legend");
    const tools = element("span", "chart-tools");
    head.append(title, legend, tools);
    const plot = element("div", "chart-plot");
    plot.tabIndex = 0;
    plot.setAttribute("role", "img");
    const tip = element("div", "chart-tip");
    tip.setAttribute("role", "status");
    tip.hidden = true;
    figure.append(head, plot);
    parent.append(figure);

    const chart = { spec, plot, tip, legend, u: null, lines: [], logarithmic: false, hiddenRuns: new Set() };
    chart.all = button("see all", "Show the whole run again", () => seeAll(chart));
    chart.all.hidden = true;
    tools.append(chart.all);
    if (spec.log) tools.append(logButton(chart));
    chart.setLines = (lines) => setLines(chart, lines);
    chart.setRun = (run, on) => setRun(chart, run, on);
    chart.destroy = () => destroy(chart, figure);
    chart.watch = new ResizeObserver(() => fit(chart));
    chart.setLines(spec.lines);
    plot.append(tip);
    chart.watch.observe(plot);
    walkByKeys(chart);
    alive.add(chart);
    return chart;
  }

  function destroy(chart, figure) {
    alive.delete(chart);
    chart.watch.disconnect();
    if (chart.u) chart.u.destroy();
    figure.remove();
  }

  /* Draws anew only when there are other lines: what has merely grown keeps its zoom. */
  function setLines(chart, lines) {
    const shape = (all) => JSON.stringify(all.map((l) => [l.label, l.colour, l.run, !l.low, l.faint, l.points]));
    const same = chart.u && shape(lines) === shape(chart.lines);
    const zoomed = same && isZoomed(chart) ? { ...chart.u.scales.x } : null;
    chart.lines = lines;
    if (same) {
      chart.u.setData(table(lines), true);
      if (zoomed) chart.u.setScale("x", { min: zoomed.min, max: zoomed.max });
    } else {
      build(chart);
    }
    describe(chart);
  }

  function setRun(chart, run, on) {
    if (on) chart.hiddenRuns.delete(run);
    else chart.hiddenRuns.add(run);
    let at = 1;
    for (const line of chart.lines) {
      const end = at + (line.low ? 3 : 1);
      for (; at < end; at++) chart.u.setSeries(at, { show: isShown(chart, line) });
    }
    describe(chart);
  }

  const isShown = (chart, line) => !line.hidden && !chart.hiddenRuns.has(line.run);

  function build(chart) {
    if (chart.u) chart.u.destroy();
    const { spec, plot } = chart;
    const series = [{}];
    const bands = [];
    for (const line of chart.lines) {
      const stroke = () => colours().series[(line.colour || 0) % 8];
      const show = isShown(chart, line);
      const edge = { show, stroke: null, points: { show: false } };
      if (line.low) {
        // the band lies below its line, so that the line stays clear
        bands.push({ series: [series.length + 1, series.length], fill: () => faded(stroke(), 0.18) });
        series.push({ ...edge }, { ...edge });
      }
      series.push({
        show,
        stroke: line.faint ? () => faded(stroke(), 0.55) : stroke,
        width: line.faint ? 1 : 1.75,
        points: pointsOf(line, stroke),
      });
    }
    const axis = (more) => ({
      stroke: () => colours().soft,
      grid: { stroke: () => colours().grid, width: 1 },
      ticks: { show: false },
      font: `11px ${colours().font}`,
      ...more,
    });
    const options = {
      width: Math.max(plot.clientWidth, 120),
      height: Math.max(plot.clientHeight, 120),
      padding: [8, 16, 0, 0],
      series,
      bands,
      legend: { show: false },
      scales: {
        x: { time: false, range: (u, min, max) => stepRange(chart, u.data[0], min, max) },
        y: chart.logarithmic ? { distr: 3 } : { range: (u, min, max) => valueRange(spec, min, max) },
      },
      axes: [
        axis({
          grid: { show: false },
          space: (u) => (u.width > 700 ? 110 : 64),
          size: 28,
          values: (u, splits) => splits.map((step) => (Number.isInteger(step) ? shortNumber(step) : "")),
        }),
        axis({
          space: 34,
          // wide enough for nearly all figures, so that charts below each other are aligned
          size: (u, values) => 14 + 6.4 * Math.max(6, ...(values || []).map((text) => (text || "").length)),
          values: (u, splits) => (chart.logarithmic ? logTicks : evenTicks)(splits, spec.kind),
        }),
      ],
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: true, y: false, dist: 6 },
        sync: { key: spec.group || "steps", setSeries: false, scales: ["x", null] },
      },
      hooks: {
        setCursor: [() => showTip(chart)],
        setScale: [(u, key) => key === "x" && (chart.all.hidden = !isZoomed(chart))],
        draw: [(u) => drawMarks(u, spec)],
      },
    };
    chart.u = new uPlot(options, table(chart.lines), plot);
    writeLegend(chart);
  }

  function pointsOf(line, stroke) {
    const few = line.steps.length <= 60;
    return { show: line.steps.length === 1 || Boolean(line.points && few), size: 5, width: 1.5, stroke, fill: stroke };
  }

  function table(lines) {
    const tables = lines.map((l) => [l.steps, ...(l.low ? [l.low, l.high] : []), l.mean]);
    return tables.length ? uPlot.join(tables) : [[]];
  }

  /* First and last step that the whole chart shows; null where it has none. */
  function wholeRange(chart, steps) {
    const ends = [...(chart.spec.span || []), ...(steps.length ? [steps[0], steps[steps.length - 1]] : [])];
    if (!ends.length) return null;
    const [min, max] = [Math.min(...ends), Math.max(...ends)];
    return min === max ? [min - 1, max + 1] : [min, max];
  }

  function stepRange(chart, steps, min, max) {
    const whole = wholeRange(chart, steps);
    const all = whole && (min == null || (min <= steps[0] && max >= steps[steps.length - 1]));
    return all ? whole : min === max ? [min - 1, max + 1] : [min, max];
  }

  function valueRange(spec, min, max) {
    const values = (spec.marks || []).map((mark) => mark.value);
    min = Math.min(min ?? Infinity, ...values);
    max = Math.max(max ?? -Infinity, ...values);
    if (!Number.isFinite(min) || !Number.isFinite(max)) return [0, 1];
    if (spec.zero && min >= 0) min = 0;
    if (min === max) return min === 0 ? [0, 1] : [min - Math.abs(min) * 0.1, max + Math.abs(max) * 0.1];
    const room = (max - min) * 0.06;
    return [spec.zero && min === 0 ? 0 : min - room, max + room];
  }

  function drawMarks(u, spec) {
    const { ctx, bbox } = u;
    const ratio = window.devicePixelRatio || 1;
    for (const [i, mark] of (spec.marks || []).entries()) {
      const y = Math.round(u.valToPos(mark.value, "y", true)) + 0.5;
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colours().soft;
      ctx.lineWidth = ratio;
      ctx.setLineDash([4 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.font = `${11 * ratio}px ${colours().font}`;
      const right = i % 2 === 0; // two marks may lie close together
      ctx.textAlign = right ? "right" : "left";
      const below = y - bbox.top < 18 * ratio;
      ctx.textBaseline = below ? "top" : "bottom";
      ctx.fillText(mark.label, right ? bbox.left + bbox.width - 2 * ratio : bbox.left + 2 * ratio, y + (below ? 4 : -4) * ratio);
      ctx.restore();
    }
  }

  function isZoomed(chart) {
    const whole = wholeRange(chart, chart.u.data[0]);
    const { min, max } = chart.u.scales.x;
    return whole !== null && min != null && (min > whole[0] || max < whole[1]);
  }

  function seeAll(chart) {
    for (const other of alive) {
      const whole = wholeRange(other, other.u.data[0]);
      if ((other.spec.group || "steps") !== (chart.spec.group || "steps") || !whole) continue;
      other.u.setScale("x", { min: whole[0], max: whole[1] });
    }
  }

  /* The tip follows the pointer, or the keys: in the chart that has them, not in those that only follow. */
  function showTip(chart) {
    const { u, tip, plot } = chart;
    const left = u ? u.cursor.left : -1;
    const wanted = left >= 0 && (plot.matches(":hover") || document.activeElement === plot);
    tip.hidden = !wanted;
    if (!wanted) return;
    const at = u.posToVal(left, "x");
    const found = chart.lines
      .filter((line) => isShown(chart, line) && line.steps.length)
      .map((line) => [line, nearest(line.steps, at)]);
    if (!found.length) return void (tip.hidden = true);
    const closest = found.reduce((a, b) => (distance(b, at) < distance(a, at) ? b : a));
    const rows = found.map(([line, i]) => tipRow(chart, line, i));
    tip.replaceChildren(element("div", "tip-step", `step ${closest[0].steps[closest[1]].toLocaleString("en")}`), ...rows);
    const offset = u.over.offsetLeft + left;
    const flip = offset > plot.clientWidth / 2;
    tip.style.left = flip ? "" : `${offset + 12}px`;
    tip.style.right = flip ? `${plot.clientWidth - offset + 12}px` : "";
  }

  function tipRow(chart, line, i) {
    const row = element("div", "tip-row");
    const format = (value) => formatValue(value, chart.spec.kind);
    const value = line.mean[i] == null ? "not a number" : format(line.mean[i]);
    row.append(swatch(line), element("span", "tip-label", line.label));
    if (line.low && line.low[i] != null && line.low[i] !== line.high[i])
      row.append(element("span", "tip-range", `${format(line.low[i])} – ${format(line.high[i])}`));
    row.append(element("span", "tip-value", value));
    return row;
  }

  const distance = ([line, i], at) => Math.abs(line.steps[i] - at);

  function nearest(steps, at) {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < at) low = middle + 1;
      else high = middle;
    }
    return low > 0 && at - steps[low - 1] <= steps[low] - at ? low - 1 : low;
  }

  function walkByKeys(chart) {
    chart.plot.addEventListener("keydown", (event) => {
      const { u } = chart;
      const steps = u.data[0];
      const now = u.cursor.left >= 0 ? nearest(steps, u.posToVal(u.cursor.left, "x")) : steps.length - 1;
      const far = event.shiftKey ? Math.max(1, Math.round(steps.length / 20)) : 1;
      const to = { ArrowLeft: now - far, ArrowRight: now + far, Home: 0, End: steps.length - 1 }[event.key];
      if (event.key === "Escape") {
        seeAll(chart);
        u.setCursor({ left: -10, top: -10 });
      } else if (to !== undefined && steps.length) {
        const step = steps[Math.min(Math.max(to, 0), steps.length - 1)];
        u.setCursor({ left: u.valToPos(step, "x"), top: u.over.clientHeight / 2 });
        event.preventDefault();
      }
    });
    chart.plot.addEventListener("blur", () => chart.u.setCursor({ left: -10, top: -10 }));
    chart.plot.addEventListener("mouseleave", () => (chart.tip.hidden = true));
  }

  function writeLegend(chart) {
    const lines = chart.spec.legend === false || chart.lines.length < 2 ? [] : chart.lines;
    const items = lines.map((line) => {
      const item = element("span", "legend-item");
      item.append(swatch(line), element("span", "", line.label));
      return item;
    });
    chart.legend.replaceChildren(...items);
  }

  function describe(chart) {
    const last = chart.lines
      .filter((line) => isShown(chart, line) && line.steps.length)
      .map((line) => {
        const end = line.steps.length - 1;
        return `${line.label} ${formatValue(line.mean[end], chart.spec.kind)} at step ${line.steps[end]}`;
      });
    const what = [chart.spec.title, chart.spec.unit].filter(Boolean).join(", ");
    chart.plot.setAttribute("aria-label", `${what}: ${last.join("; ") || "no values"}`);
  }

  function logButton(chart) {
    const on = button("log", "Logarithmic value axis", () => {
      chart.logarithmic = !chart.logarithmic;
      on.setAttribute("aria-pressed", String(chart.logarithmic));
      build(chart);
    });
    on.setAttribute("aria-pressed", "false");
    return on;
  }

  function fit(chart) {
    const width = Math.floor(chart.plot.clientWidth);
    const height = Math.floor(chart.plot.clientHeight);
    if (width > 0 && height > 0 && (width !== chart.u.width || height !== chart.u.height))
      chart.u.setSize({ width, height });
  }

  function colours() {
    if (palette) return palette;
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    palette = {
      series: Array.from({ length: 8 }, (_, i) => of(`--series-${i}`)),
      soft: of("--soft"),
      grid: of("--grid"),
      font: of("--font") || "sans-serif",
    };
    return palette;
  }

  /* A colour of style.css (#rrggbb) that lets what lies below through. */
  function faded(colour, opacity) {
    return colour + Math.round(opacity * 255).toString(16).padStart(2, "0");
  }

  function redraw() {
    palette = null;
    for (const chart of alive) chart.u.redraw(false, true);
  }

  /* Paper is white, and as wide as it is. */
  function toPaper(on) {
    document.documentElement.toggleAttribute("data-paper", on);
    palette = null;
    for (const chart of alive) {
      if (on) chart.u.setSize({ width: 330, height: 190 });
      else fit(chart);
      chart.u.redraw(false, true);
    }
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => toPaper(true));
  window.addEventListener("afterprint", () => toPaper(false));

  function shortNumber(value) {
    const size = Math.abs(value);
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (size >= unit) return `${trimmed(value / unit, 4)}${name}`;
    return trimmed(value, 4);
  }

  const exponential = (value) => value.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−");

  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));

  function formatValue(value, kind) {
    if (value == null || Number.isNaN(value)) return "–";
    if (kind === "percent") return `${(value * 100).toFixed(Math.abs(value) < 0.1 ? 2 : 1)} %`;
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return size >= 1e4 ? shortNumber(value) : trimmed(value, 4);
  }

  /* All ticks of an axis with as many digits as tell them apart. */
  function evenTicks(splits, kind) {
    const scale = kind === "percent" ? 100 : 1;
    const values = splits.map((value) => value * scale);
    const gap = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0]) || 1;
    const most = Math.max(...values.map(Math.abs));
    const end = kind === "percent" ? " %" : "";
    if (most >= 1e4) return values.map((value) => shortNumber(value) + end);
    if (most < 1e-2) return values.map((value) => (value === 0 ? "0" : exponential(value)) + end);
    let digits = 0;
    while (digits < 6 && Math.abs(Number(gap.toFixed(digits)) - gap) > gap * 1e-6) digits++;
    return values.map((value) => value.toFixed(digits) + end);
  }

  /* 1, 2 and 5 of each power of ten. */
  function logTicks(splits, kind) {
    return splits.map((value) => {
      const digit = value == null ? 0 : value / 10 ** Math.floor(Math.log10(value) + 1e-9);
      return [1, 2, 5].some((wanted) => Math.abs(digit - wanted) < 1e-6) ? formatValue(value, kind) : "";
    });
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function button(text, label, click) {
    const made = element("button", "chart-tool", text);
    made.type = "button";
    made.title = label;
    made.addEventListener("click", click);
    return made;
  }

  function swatch(line) {
    const made = element("span", line.faint ? "swatch faint" : "swatch");
    made.style.setProperty("--swatch", `var(--series-${(line.colour || 0) % 8})`);
    return made;
  }

  return { draw, element, swatch, formatValue, shortNumber };
})();
