/* The page's heart: asks for what is new, at the pace of somebody who looks, and shows one of three views. */

import { made, write } from "./format.js";
import { listView } from "./list.js";
import { runView } from "./run.js";
import { compareView } from "./compare.js";

const VISIBLE_MS = 2000;
const PENDING_MS = 300;
const HIDDEN_MS = 60000;
const MOST_COMPARED = 8;

export const board = {
  runs: new Map(),
  jobs: [],
  directory: "",
  complete: true,
  ticked: new Set(),
  most: MOST_COMPARED,
  clockAhead: 0, // seconds by which the server's clock is before ours
  now: () => Date.now() / 1000 + board.clockAhead,
  ask,
  tick(id, on) {
    if (on && board.ticked.size >= MOST_COMPARED) return false;
    if (on) board.ticked.add(id);
    else board.ticked.delete(id);
    return true;
  },
};

const source = { path: "/api/runs", token: "" };
const place = document.getElementById("view");
const pulse = document.getElementById("pulse");
let view = null;
let timer = 0;
let failures = 0;
let asking = false;
let again = false;

/* What changed at a source {path, token} since it was asked last; null when nothing did. */
async function ask(source) {
  const since = source.token ? `?since=${source.token}` : "";
  const headers = source.token ? { "If-None-Match": `"${source.token}"` } : {};
  const answer = await fetch(source.path + since, { headers, cache: "no-store" });
  const date = Date.parse(answer.headers.get("Date") || "");
  if (date) board.clockAhead = Math.abs(date - Date.now()) < 3000 ? 0 : (date - Date.now()) / 1000;
  if (answer.status === 304) {
    await answer.arrayBuffer(); // an answer that is not read to its end counts as broken off
    return null;
  }
  if (!answer.ok) throw Object.assign(new Error(`${answer.status}`), { status: answer.status });
  const found = await answer.json();
  source.token = found.token;
  return found.same ? null : found;
}

async function turn() {
  clearTimeout(timer);
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  let pending = false;
  try {
    const found = await ask(source);
    if (found) {
      take(found);
      pending = found.pending;
    }
    await view.update(Boolean(found));
    failures = 0;
    write(pulse, "");
  } catch (error) {
    failures += 1;
    if (failures > 1) write(pulse, "The board does not answer; trying again.");
    if (!(error instanceof TypeError) && !error.status) console.error(error);
  }
  asking = false;
  const pause = document.hidden ? HIDDEN_MS : pending ? PENDING_MS : VISIBLE_MS * Math.min(8, 1 + failures);
  timer = setTimeout(turn, again ? 0 : pause);
  again = false;
}

function take(found) {
  if (found.whole) board.runs.clear();
  for (const id of found.gone) board.runs.delete(id);
  for (const run of found.runs) board.runs.set(run.id, run);
  for (const id of board.ticked) if (!board.runs.has(id)) board.ticked.delete(id);
  if (found.directory !== undefined) {
    Object.assign(board, { directory: found.directory, jobs: found.jobs, complete: found.complete });
    write(document.getElementById("where"), found.directory);
  }
}

function route() {
  const [, kind, rest] = location.hash.match(/^#\/(run|compare)\/([0-9a-f,]+)$/) || [];
  if (view) view.destroy();
  place.replaceChildren();
  if (kind === "run") view = runView(board, place, rest);
  else if (kind === "compare") {
    board.ticked = new Set(rest.split(",").slice(0, MOST_COMPARED));
    view = compareView(board, place, [...board.ticked]);
  } else view = listView(board, place);
  window.scrollTo(0, 0);
  turn();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && typing) return void event.target.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  if (event.key === "Escape" && location.hash.length > 2 && !event.target.closest(".chart-plot")) location.hash = "#/";
  else if (view.key && view.key(event)) event.preventDefault();
});
document.addEventListener("visibilitychange", () => !document.hidden && turn());
window.addEventListener("hashchange", route);
if (!window.uPlot) place.append(made("p", { class: "notice bad" }, "The page's scripts have not arrived; load it again."));
route();
