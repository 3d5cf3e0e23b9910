/* Figures, times and elements, alike on every view. All that comes from the server reaches the page as text. */

export const { element, swatch, formatValue, shortNumber } = TrainwayCharts;

export const STATES = ["running", "stalled", "failed", "killed", "stopped", "done", "new"];

/* An element with attributes and children; strings become text. */
export function made(name, attributes = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key === "class") found.className = value;
    else if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return found;
}

/* Writes only what is another text: nothing is selected, read out or laid out again for nothing. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const count = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));

export function clock(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole >= 48 * 3600) return `${(whole / 86400).toFixed(1)} days`;
  const pad = (value) => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const rest = `${pad(Math.floor((whole % 3600) / 60))}:${pad(whole % 60)}`;
  return hours ? `${hours}:${rest}` : rest.replace(/^0/, "");
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

export const ago = (seconds) => (seconds < 5 ? "now" : `${duration(seconds)} ago`);

export const dollars = (value) =>
  `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;

export function bytes(value) {
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (value >= unit) return `${(value / unit).toFixed(value < 10 * unit ? 1 : 0)} ${name}`;
  return `${value} B`;
}

/* The newest value of a metric; NaN and infinities by their names; losses with digits that stand below each other. */
export function figure(run, name, kind) {
  const found = run.figures[name];
  if (!found) return "–";
  if (typeof found[1] === "string") return found[1];
  return kind === "loss" && Math.abs(found[1]) < 1000 ? found[1].toFixed(3) : formatValue(found[1], kind);
}

export const value = (run, name) => {
  const found = run.figures[name];
  return found && typeof found[1] === "number" ? found[1] : null;
};

export const trainLoss = (run) => (run.figures["train/loss"] ? "train/loss" : "train/student_loss");

/* Dollars until now: what the server knew, and the clock since. */
export function spent(cost, now) {
  return cost.spent + (cost.goes_on ? (cost.per_hour * Math.max(0, now - cost.at)) / 3600 : 0);
}

export const dollarsLeft = (run) =>
  run.cost && run.seconds_left !== null ? (run.cost.per_hour * run.seconds_left) / 3600 : null;

/* Seconds of work of the run's last start, or of all of it where it is done. */
export function secondsSoFar(run, now) {
  if (run.seconds !== null) return run.seconds;
  if (run.began === null || run.changed === null) return null;
  const ends = run.state === "running" || run.state === "stalled" ? now : run.changed;
  return Math.max(0, ends - run.began);
}

export const share = (run) => (run.total ? Math.min(1, run.step / run.total) : null);

export function bar(run) {
  const inner = made("i");
  const outer = made("span", { class: "meter", role: "img" }, inner);
  paintBar(outer, run);
  return outer;
}

export function paintBar(outer, run) {
  const part = share(run);
  outer.className = `meter ${run.state}`;
  outer.setAttribute("aria-label", part === null ? "length unknown" : `${Math.floor(part * 100)} %`);
  outer.firstChild.style.width = `${(part ?? 0) * 100}%`;
}

export function stepText(run) {
  const part = share(run);
  return run.total ? `${count(run.step)} of ${count(run.total)} · ${Math.floor(part * 100)} %` : `step ${count(run.step)}`;
}

export const about = (run) => [run.recipe, run.model, run.stage].filter(Boolean);
