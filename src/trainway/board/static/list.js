/* All runs: searched, filtered by state, sorted, ticked to be compared; below them the jobs. */

import {
  STATES, about, ago, bar, clock, count, dollars, dollarsLeft, duration, figure, made, paintBar, secondsSoFar, share, spent,
  stepText, trainLoss, value, write,
} from "./format.js";

const COLUMNS = [
  { key: "name", label: "Run", sort: (run) => `${run.name}\n${run.folder}`.toLowerCase() },
  { key: "status", label: "State", sort: (run) => STATES.indexOf(run.state) },
  { key: "progress", label: "Progress", sort: (run) => share(run) ?? -1, down: true },
  { key: "left", label: "Time left", number: true, sort: (run) => run.seconds_left ?? Infinity },
  { key: "train", label: "Loss", number: true, sort: (run) => value(run, trainLoss(run)) ?? Infinity },
  { key: "val", label: "Val. loss", number: true, sort: (run) => value(run, "val/loss") ?? Infinity },
  { key: "speed", label: "Tokens/s", number: true, sort: (run) => value(run, "perf/tokens_per_s") ?? -1, down: true },
  { key: "cost", label: "Cost", number: true, sort: (run) => run.cost?.spent ?? 0, down: true },
  { key: "seen", label: "Last sign", number: true, sort: (run) => run.changed ?? 0, down: true },
];

const kept = { search: "", state: "", sort: "", down: false }; // of this visit, when one comes back from a run

export function listView(board, place) {
  document.title = "Trainway board";
  const rows = new Map();
  const search = made("input", {
    type: "search", id: "search", placeholder: "Search runs", "aria-label": "Search runs by name, recipe or model", value: kept.search,
    oninput: () => { kept.search = search.value; arrange(); },
  });
  const chips = made("span", { class: "chips", role: "group", "aria-label": "States" });
  const compare = made("button", { type: "button", class: "action", hidden: true, onclick: () => goCompare() });
  const total = made("p", { class: "total soft", role: "status" });
  const order = made("select", {
    class: "order", "aria-label": "Sort by",
    onchange: () => { sortBy(COLUMNS.find((column) => column.key === order.value) || null, false); },
  }, made("option", { value: "" }, "Newest first"), ...COLUMNS.map((c) => made("option", { value: c.key }, c.label)));
  const head = made("tr", {}, made("th", { class: "tick" }, made("span", { class: "hidden-label" }, "Compare")));
  const heads = new Map();
  for (const column of COLUMNS) {
    const button = made("button", { type: "button", onclick: () => sortBy(column, true) }, column.label);
    const cell = made("th", { scope: "col", class: `${column.key}${column.number ? " number" : ""}` }, button);
    heads.set(column.key, cell);
    head.append(cell);
  }
  const body = made("tbody");
  const table = made("table", { class: "runs-table" }, made("thead", {}, head), body);
  const empty = made("p", { class: "empty soft", hidden: true });
  const jobs = made("section", { hidden: true, "aria-label": "Jobs" });
  const keys = made("p", { class: "keys soft" });
  for (const [key, what] of [["/", "search"], ["↑ ↓", "move"], ["Enter", "open"], ["x", "tick"], ["c", "compare"], ["Esc", "back"]])
    keys.append(made("kbd", {}, key), ` ${what}`);
  place.append(
    made("h1", { class: "hidden-label" }, "Runs"),
    made("div", { class: "tools" }, search, chips, order, compare), total, table, empty, jobs, keys,
  );

  function sortBy(column, toggles) {
    if (!column) Object.assign(kept, { sort: "", down: false });
    else if (toggles && kept.sort === column.key && kept.down !== Boolean(column.down)) Object.assign(kept, { sort: "", down: false });
    else if (toggles && kept.sort === column.key) kept.down = !kept.down;
    else Object.assign(kept, { sort: column.key, down: Boolean(column.down) });
    arrange();
  }

  function goCompare() {
    if (board.ticked.size > 1) location.hash = `#/compare/${[...board.ticked].join(",")}`;
  }

  function update(changed) {
    const now = board.now();
    for (const [id, row] of rows)
      if (!board.runs.has(id)) {
        row.node.remove();
        rows.delete(id);
      }
    for (const run of board.runs.values()) {
      let row = rows.get(run.id);
      if (!row) rows.set(run.id, (row = newRow(board, run, arrangeTicks)));
      row.show(run, now);
    }
    if (changed || !rows.size) {
      showChips();
      arrange();
      showJobs(board, jobs);
    }
    showTotal(now);
  }

  function showChips() {
    const counts = new Map();
    for (const run of board.runs.values()) counts.set(run.state, (counts.get(run.state) || 0) + 1);
    if (kept.state && !counts.has(kept.state)) kept.state = "";
    const wanted = STATES.filter((state) => counts.has(state));
    const text = wanted.map((state) => `${state}:${counts.get(state)}:${kept.state === state}`).join();
    if (chips.dataset.text === text) return;
    chips.dataset.text = text;
    const focused = chips.contains(document.activeElement) ? document.activeElement.dataset.state : null;
    chips.replaceChildren(...wanted.map((state) => made("button", {
      type: "button", class: "chip", "data-state": state, "aria-pressed": String(kept.state === state),
      onclick: () => { kept.state = kept.state === state ? "" : state; showChips(); arrange(); },
    }, made("span", { class: `state ${state}` }, state), ` ${counts.get(state)}`)));
    if (focused) chips.querySelector(`[data-state=${focused}]`)?.focus();
  }

  function arrange() {
    const words = kept.search.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (run) => [run.name, run.folder, run.state, run.recipe, run.model, run.stage].join(" ").toLowerCase();
    const shown = [...board.runs.values()].filter(
      (run) => (!kept.state || run.state === kept.state) && words.every((word) => text(run).includes(word)),
    );
    const column = COLUMNS.find((c) => c.key === kept.sort);
    const alive = (run) => (run.state === "running" || run.state === "stalled" ? 0 : 1);
    const usual = (a, b) => alive(a) - alive(b) || (alive(a) ? (b.changed ?? 0) - (a.changed ?? 0) : (b.began ?? 0) - (a.began ?? 0)) || (a.name < b.name ? -1 : 1);
    shown.sort((a, b) => {
      if (!column) return usual(a, b);
      const [one, other] = [column.sort(a), column.sort(b)];
      return (one < other ? -1 : one > other ? 1 : 0) * (kept.down ? -1 : 1) || usual(a, b);
    });
    for (const [key, cell] of heads) {
      if (key === kept.sort) cell.setAttribute("aria-sort", kept.down ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    order.value = kept.sort;
    const nodes = shown.map((run) => rows.get(run.id)?.node).filter(Boolean);
    if (nodes.length !== body.children.length || nodes.some((node, i) => body.children[i] !== node)) {
      const focused = body.contains(document.activeElement) ? document.activeElement : null;
      body.replaceChildren(...nodes);
      if (focused && document.activeElement !== focused) focused.focus({ preventScroll: true });
    }
    table.hidden = !nodes.length;
    empty.hidden = Boolean(nodes.length);
    write(empty, board.runs.size ? "No run is like this." : board.directory ? "No runs here yet. A run appears when its training begins." : "Looking …");
    arrangeTicks();
  }

  function arrangeTicks() {
    const size = board.ticked.size;
    compare.hidden = size === 0;
    compare.disabled = size < 2;
    write(compare, size < 2 ? "Tick another run to compare" : `Compare ${size} runs${size === board.most ? " (the most)" : ""}`);
    for (const [id, row] of rows) row.box.checked = board.ticked.has(id);
  }

  function showTotal(now) {
    const alive = [...board.runs.values()].filter((run) => run.cost?.goes_on);
    const parts = [];
    if (alive.length) {
      parts.push(`${dollars(alive.reduce((sum, run) => sum + spent(run.cost, now), 0))} spent on what runs now`);
      const left = alive.map(dollarsLeft).filter((found) => found !== null);
      if (left.length) parts.push(`${dollars(left.reduce((a, b) => a + b, 0))} to go`);
      parts.push(`${dollars(alive.reduce((sum, run) => sum + run.cost.per_hour, 0))} an hour`);
    }
    if (!board.complete) parts.push("the directory has more entries than are looked at: name a smaller one");
    write(total, parts.join(" · "));
    const running = [...board.runs.values()].filter((run) => run.state === "running").length;
    document.title = running ? `${running} running · Trainway board` : "Trainway board";
  }

  function key(event) {
    const links = [...body.querySelectorAll("a.name")];
    const at = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
    const to = { ArrowDown: at + 1, j: at + 1, ArrowUp: at - 1, k: at - 1, Home: 0, End: links.length - 1 }[event.key];
    if (event.key === "/") search.focus();
    else if (event.key === "c") goCompare();
    else if (event.key === "x" && at >= 0) links[at].closest("tr").querySelector("input").click();
    else if (to !== undefined && links.length && !event.target.closest("input[type=checkbox], .chips"))
      links[Math.min(Math.max(to, 0), links.length - 1)].focus();
    else return false;
    return true;
  }

  update(true);
  return { update, key, destroy() {} };
}

function newRow(board, run, ticked) {
  const box = made("input", {
    type: "checkbox",
    onchange: () => { if (!board.tick(run.id, box.checked)) box.checked = false; ticked(); },
  });
  const link = made("a", { class: "name", href: `#/run/${run.id}` });
  const sub = made("span", { class: "sub soft" });
  const state = made("span");
  const warned = made("span", { class: "warned", hidden: true });
  const meter = bar(run);
  const steps = made("span", { class: "sub soft" });
  const cells = {
    name: [link, sub], status: [state, warned], progress: [meter, steps],
    left: [made("span")], train: [made("span")], val: [made("span")], speed: [made("span")],
    cost: [made("span"), made("span", { class: "sub soft" })], seen: [made("span")],
  };
  const node = made("tr", {}, made("td", { class: "tick" }, made("label", {}, box)));
  for (const column of COLUMNS)
    node.append(made("td", { class: `${column.key}${column.number ? " number" : ""}`, "data-label": column.label }, ...cells[column.key]));

  function show(found, now) {
    run = found;
    write(link, run.name);
    box.setAttribute("aria-label", `Compare ${run.name}`);
    write(sub, [run.folder, ...about(run)].filter(Boolean).join(" · "));
    state.className = `state ${run.state}`;
    write(state, run.state);
    warned.hidden = !run.warned;
    write(warned, run.warned ? `${run.warned} warning${run.warned > 1 ? "s" : ""}` : "");
    paintBar(meter, run);
    write(steps, stepText(run));
    write(cells.left[0], run.seconds_left === null ? "–" : clock(run.seconds_left));
    write(cells.train[0], figure(run, trainLoss(run), "loss"));
    write(cells.val[0], figure(run, "val/loss", "loss"));
    const speed = value(run, "perf/tokens_per_s");
    write(cells.speed[0], speed === null ? "–" : count(Math.round(speed)));
    const [main, rest] = costText(run, now);
    write(cells.cost[0], main);
    write(cells.cost[1], rest);
    write(cells.seen[0], run.changed === null ? "–" : ago(now - run.changed));
    node.classList.toggle("alive", run.state === "running");
  }
  return { node, box, show };
}

/* Dollars where a price is known, else the hours. */
export function costText(run, now) {
  if (run.cost) {
    const left = dollarsLeft(run);
    return [dollars(spent(run.cost, now)), left === null ? "" : `${dollars(left)} left`];
  }
  const seconds = secondsSoFar(run, now);
  return [seconds === null ? "–" : duration(seconds), ""];
}

function showJobs(board, section) {
  const now = board.now();
  section.hidden = !board.jobs.length;
  const head = ["Job", "Where", "Stage", "Step", "Spent", "Limit", "Heard of"].map((label, i) =>
    made("th", { scope: "col", class: i > 2 ? "number" : null }, label));
  const rows = board.jobs.map((job) => made("tr", {},
    made("th", { scope: "row" }, job.run ? made("a", { href: `#/run/${job.run}` }, job.job) : job.job),
    made("td", {}, job.target === "here" ? "in this directory" : job.target),
    made("td", {}, made("span", { class: `state ${job.outcome || (job.stage === "train" ? "running" : "")}` }, [job.stage, job.outcome].filter(Boolean).join(": ")),
      job.reason ? made("span", { class: "sub soft" }, job.reason) : null,
      job.restarts ? made("span", { class: "sub soft" }, `started again ${job.restarts} times`) : null),
    made("td", { class: "number" }, job.total ? `${count(job.step)} of ${count(job.total)}` : job.step ? count(job.step) : "–"),
    made("td", { class: "number" }, job.cost ? dollars(spent(job.cost, now)) : "–",
      job.cost ? made("span", { class: "sub soft" }, `${dollars(job.cost.per_hour)} an hour`) : null),
    made("td", { class: "number" }, job.limit_dollars ? dollars(job.limit_dollars) : "–"),
    made("td", { class: "number" }, job.updated ? ago(now - job.updated) : "–"),
  ));
  const body = made("tbody", {}, ...rows);
  section.replaceChildren(made("h2", {}, "Jobs"),
    made("div", { class: "scroll" }, made("table", { class: "jobs-table" }, made("thead", {}, made("tr", {}, ...head)), body)));
}
