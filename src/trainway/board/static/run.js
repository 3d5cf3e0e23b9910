/* One run: its figures, its charts as they grow, warnings, samples, checkpoints, the end of its log, its settings. */

import {
  about, ago, bytes, clock, count, dollars, dollarsLeft, duration, figure, made, paintBar, secondsSoFar, share, spent, stepText,
  trainLoss, value, write,
} from "./format.js";
import { CHARTS, ChartGrid, Curves, otherChart, otherMetrics } from "./curves.js";

const MOST_LINES = 3000;

export function runView(board, place, id) {
  const curves = new Curves(board, id);
  const detail = { path: `/api/runs/${id}`, token: "" };
  const title = made("h1", {}, "…");
  const state = made("span", { class: "state" });
  const aboutLine = made("p", { class: "about" });
  const description = made("p", { class: "description" });
  const meter = made("span", { class: "meter" }, made("i"));
  const steps = made("span");
  const left = made("span");
  const cards = made("dl", { class: "cards" });
  const notices = made("div");
  const grid = made("div", { class: "charts" });
  const reading = made("p", { class: "soft", role: "status", hidden: true }, "Reading a long record …");
  const others = made("details", { hidden: true, class: "others" }, made("summary", {}, "More figures"));
  const otherGrid = made("div", { class: "charts inside" });
  others.append(otherGrid);
  const parts = made("div");
  const log = logSection(board, id);
  const after = made("div");
  place.append(
    made("p", { class: "crumb" }, made("a", { href: "#/" }, "← All runs")),
    made("div", { class: "head" },
      made("div", { class: "line" }, title, state), aboutLine, description, meter, made("div", { class: "under-bar" }, steps, left)),
    cards, notices,
    made("h2", {}, "Curves"), reading, grid, others, parts, log.node, after,
  );
  const charts = new ChartGrid(grid);
  const otherCharts = new ChartGrid(otherGrid);
  others.addEventListener("toggle", () => drawOthers());
  let shownCards = "";

  async function update() {
    const run = board.runs.get(id);
    if (!run) {
      if (board.directory) write(title, "This run is not there any more");
      return;
    }
    show(run, board.now());
    if (await curves.update()) draw();
    reading.hidden = !curves.pending;
    const found = await board.ask(detail);
    if (found) showDetail(found);
    await log.update();
  }

  function show(run, now) {
    const part = share(run);
    document.title = `${part === null || run.state !== "running" ? run.state : `${Math.floor(part * 100)} %`} · ${run.name}`;
    write(title, run.name);
    state.className = `state ${run.state}`;
    write(state, run.state);
    const words = [...about(run), run.device, run.folder && `in ${run.folder}`, run.changed && `last sign ${ago(now - run.changed)}`].filter(Boolean);
    if (aboutLine.children.length !== words.length) aboutLine.replaceChildren(...words.map(() => made("span")));
    words.forEach((word, i) => write(aboutLine.children[i], word));
    paintBar(meter, run);
    write(steps, stepText(run));
    write(left, run.seconds_left === null ? "" : `${clock(run.seconds_left)} left`);
    showCards(run, now);
    notices.replaceChildren();
    if (run.error) notices.append(made("div", { class: `notice ${run.state === "stopped" ? "warn" : "bad"}` }, made("pre", {}, run.error)));
    if (run.state === "killed") notices.append(made("p", { class: "notice bad" }, "Its process is gone without a word: killed from outside, or the machine went down. The same command goes on from the last checkpoint."));
    if (run.state === "stalled") notices.append(made("p", { class: "notice warn" }, `No sign of it for ${duration(now - run.changed)}.`));
  }

  function showCards(run, now) {
    const loss = trainLoss(run);
    const validated = run.figures["val/loss"];
    const seconds = secondsSoFar(run, now);
    const rest = dollarsLeft(run);
    const speed = value(run, "perf/tokens_per_s");
    const found = [
      ["Training loss", figure(run, loss, "loss"), run.figures[loss] ? `step ${count(run.figures[loss][0])}` : ""],
      ["Validation loss", figure(run, "val/loss", "loss"), validated ? `step ${count(validated[0])}` : ""],
      ["Tokens/s", speed === null ? "–" : count(Math.round(speed)), run.figures["perf/mfu"] ? `MFU ${figure(run, "perf/mfu", "percent")}` : ""],
      ["Step", run.step_s === null ? "–" : `${run.step_s.toPrecision(3)} s`, run.figures["perf/memory_gib"] ? `${figure(run, "perf/memory_gib")} GiB` : ""],
      run.cost
        ? ["Cost", dollars(spent(run.cost, now)), [rest === null ? "" : `${dollars(rest)} left`, run.cost.source].filter(Boolean).join("; ")]
        : ["Time", seconds === null ? "–" : duration(seconds), run.seconds === null ? "since the last start" : "of training"],
    ];
    const shape = found.map(([name]) => name).join();
    if (shape !== shownCards) {
      cards.replaceChildren(...found.map(([name]) => made("div", { class: "card" }, made("dt", {}, name), made("dd", {}, made("span"), made("span", { class: "note" })))));
      shownCards = shape;
    }
    found.forEach(([, main, note], i) => {
      const cell = cards.children[i].lastChild;
      write(cell.firstChild, main);
      write(cell.lastChild, note);
    });
  }

  const linesOf = (spec) => spec.lines.filter((line) => curves.found.has(line.metric)).map(({ metric, ...line }, i) => ({ ...line, colour: spec.lines.length > 1 ? [0, 1][i % 2] : 0, ...curves.found.get(metric) }));

  function draw() {
    charts.show(CHARTS, linesOf);
    drawOthers();
  }

  function drawOthers() {
    const names = otherMetrics(curves.found.keys());
    others.hidden = !names.length;
    if (others.open) otherCharts.show(names.map(otherChart), linesOf);
  }

  function showDetail(found) {
    const open = new Set([...place.querySelectorAll("details[open]")].map((node) => node.dataset.key));
    const run = board.runs.get(id);
    write(description, found.description);
    parts.replaceChildren(
      ...(found.problem ? [made("p", { class: "notice warn" }, found.problem)] : []),
      ...warningsSection(found.warnings), ...samplesSection(found.samples, open),
    );
    after.replaceChildren(
      ...checkpointsSection(found.checkpoints, run), ...tableSection("Configuration", found.settings, "settings", open),
      ...tableSection("Origin", found.origin, "origin", open),
    );
  }

  return {
    update,
    destroy() {
      charts.destroy();
      otherCharts.destroy();
    },
  };
}

function warningsSection(warnings) {
  if (!warnings.length) return [];
  const item = (warning) => made("li", { class: warning.level }, made("time", { datetime: warning.time }, warning.time.replace("T", " ").replace("Z", "")), warning.text);
  const newest = [...warnings].reverse();
  const more = newest.slice(5);
  return [
    made("h2", {}, "Warnings"),
    made("ul", { class: "warnings" }, ...newest.slice(0, 5).map(item)),
    ...(more.length ? [made("details", { "data-key": "warnings" }, made("summary", {}, `${more.length} earlier`), made("ul", { class: "warnings inside" }, ...more.map(item)))] : []),
  ];
}

const TEXTS = [["prompt", "Prompt"], ["text", "Model"], ["student", "Student"], ["teacher", "Teacher"], ["reference", "Reference"]];

function samplesSection(samples, open) {
  if (!samples.length) return [];
  const steps = new Map();
  for (const sample of samples) steps.set(sample.step, [sample, ...(steps.get(sample.step) || [])]);
  const newest = Math.max(...steps.keys());
  const scored = { student: "score", teacher: "teacher_score" };
  const blocks = [...steps].map(([step, found]) => {
    const key = `samples-${step}`;
    const lists = found.map((sample) => made("dl", { class: "sample" }, ...TEXTS.filter(([name]) => name in sample).flatMap(([name, label]) => [
      made("dt", {}, label, scored[name] in sample ? ` ${sample[scored[name]]}` : ""),
      made("dd", {}, made("pre", {}, sample[name]), name === "student" && sample.truncated ? made("span", { class: "soft" }, " [cut off]") : null),
    ])));
    return made("details", { "data-key": key, open: open.has(key) || step === newest },
      made("summary", {}, `Step ${count(step)} `, made("span", { class: "soft" }, `${found.length} sample${found.length > 1 ? "s" : ""}`)),
      made("div", { class: "inside" }, ...lists));
  });
  return [made("h2", {}, "Samples"), made("div", { class: "samples" }, ...blocks)];
}

function checkpointsSection(checkpoints) {
  if (!checkpoints.length) return [];
  const rows = checkpoints.map((found) => made("tr", {},
    made("th", { scope: "row", class: "number" }, count(found.step)),
    made("td", { class: "number" }, bytes(found.bytes)),
    made("td", {}, found.best ? made("span", { class: "tag best" }, "best") : null, found.latest ? made("span", { class: "tag" }, "latest") : null,
      found.intact ? null : made("span", { class: "state failed" }, "damaged manifest")),
  ));
  const head = made("tr", {}, made("th", { class: "number" }, "Step"), made("th", { class: "number" }, "Size"), made("th", {}, ""));
  return [made("h2", {}, "Checkpoints"), made("div", { class: "scroll" }, made("table", { class: "narrow" }, made("thead", {}, head), made("tbody", {}, ...rows)))];
}

function tableSection(title, values, key, open) {
  const entries = Object.entries(values);
  if (!entries.length) return [];
  const rows = entries.map(([name, text]) => made("tr", {}, made("th", { scope: "row" }, name), made("td", {}, text)));
  return [made("details", { "data-key": key, open: open.has(key) },
    made("summary", {}, `${title} `, made("span", { class: "soft" }, `${entries.length} ${key === "settings" ? "settings" : "entries"}`)),
    made("div", { class: "inside scroll" }, made("table", { class: "settings-table" }, made("tbody", {}, ...rows))))];
}

/* The end of the log, which follows while one is at its end. */
function logSection(board, id) {
  const source = { path: `/api/runs/${id}/log`, token: "" };
  const lines = made("div", { class: "log", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off" });
  const button = (text, pressed, click) => {
    const found = made("button", { type: "button", class: "chart-tool", "aria-pressed": String(pressed), onclick: () => {
      const on = found.getAttribute("aria-pressed") !== "true";
      found.setAttribute("aria-pressed", String(on));
      click(on);
    } }, text);
    return found;
  };
  const toEnd = () => { lines.scrollTop = lines.scrollHeight; };
  let follows = true;
  const follow = button("follow", true, (on) => { follows = on; if (on) toEnd(); });
  const quiet = button("warnings alone", false, (on) => { lines.classList.toggle("quiet", on); if (follows) toEnd(); });
  const node = made("section", { hidden: true, "aria-label": "Log" },
    made("div", { class: "section-head" }, made("h2", {}, "Log"), made("span", { class: "chart-tools" }, quiet, follow)), lines);
  lines.addEventListener("scroll", () => {
    follows = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 24;
    follow.setAttribute("aria-pressed", String(follows));
  });

  async function update() {
    for (let i = 0; i < 4; i++) {
      const found = await board.ask(source);
      if (!found) return;
      if (found.anew) lines.replaceChildren();
      lines.append(...found.lines.map(logLine));
      while (lines.children.length > MOST_LINES) lines.firstChild.remove();
      node.hidden = !lines.children.length;
      if (follows) toEnd();
      if (found.lines.length < 100) return;
    }
  }
  return { node, update };
}

function logLine(text) {
  const level = (text.match(/^\S+Z (WARNING|ERROR|CRITICAL) /) || [])[1];
  return made("div", { class: level === "WARNING" ? "warning" : level ? "error" : null }, text || " ");
}
