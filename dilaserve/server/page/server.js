// What the server is doing: its figures, its plan, and the steps of its requests, asked for every second.

import { get } from "./api.js";
import { track } from "./canvas.js";
import { drawCharts } from "./charts.js";
import { clock, count, fillTerms, find, make, seconds, share, threshold } from "./dom.js";
import { isBusy } from "./playground.js";

const EVERY = 1000; // ms between two questions
const KEPT = 600; // seconds of history
const LATELY = 10; // seconds that the rate of tokens is of

let history = null;

/** Ask again and again; `first` is called with the first answer. */
export async function watch(first) {
  let told = false;
  for (;;) {
    if (!document.hidden) told = (await look(told ? null : first)) || told;
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

async function look(first) {
  try {
    const stats = await get(`v1/stats?since=${history?.at.at(-1) ?? 0}`);
    note("");
    history = joined(history, stats.history);
    if (first) first(stats);
    show(stats);
    await drawCharts(history, !isBusy());
    return true;
  } catch (error) {
    note(error.message);
    return false;
  }
}

function note(message) {
  const notice = find("#notice");
  if (notice.textContent !== message) notice.textContent = message;
  notice.hidden = !message;
  find("#health").textContent = message ? "not reachable" : "running";
}

function joined(old, more) {
  const names = Object.keys(more);
  return Object.fromEntries(names.map((name) => [name, [...(old?.[name] ?? []), ...more[name]].slice(-KEPT)]));
}

function show(stats) {
  showTiles(stats);
  showPlan(stats.plan);
  showRequests(stats);
}

function showTiles({ requests, budget }) {
  const { met, missed, declined, refused, failed } = requests.deadlines;
  const all = met + missed + declined + refused + failed;
  const tokens = history.tokens.slice(-LATELY);
  const rate = tokens.length ? tokens.reduce((total, value) => total + value, 0) / tokens.length : 0;
  fillTerms(find("#tiles"), [
    ["Running", requests.running],
    ["Waiting", requests.waiting],
    ["Answered", requests.fates.answered],
    ["Deadlines met", all ? share(met / all) : "–"],
    ["Median latency", seconds(history.p50.at(-1))],
    ["Tokens a second", Math.round(rate)],
    ["Accuracy budget", budget.used === null ? "off" : share(budget.used)],
  ]);
}

let planShown = "";

function showPlan(plan) {
  const text = JSON.stringify(plan);
  if (text === planShown) return;
  planShown = text;
  const control = plan.auto ? "The planner chooses it." : plan.no_planner ? `It stays: ${plan.no_planner}.` : "It was chosen by hand.";
  const change = plan.wanted === plan.plan ? "" : ` It is changing to ${plan.wanted}.`;
  find("#plan-summary").textContent = `${plan.plan}: ${count(plan.groups.length, "instance")} on ${count(plan.devices.length, "device")}. ${control}${change}`;
  const used = new Set(plan.groups.flat());
  const idle = plan.devices.map((_, rank) => rank).filter((rank) => !used.has(rank));
  const boxes = plan.groups.map((group) => box(plan, group, group.length === 1 ? "one device" : `tensor parallel, ${group.length} devices`));
  if (idle.length) boxes.push(box(plan, idle, "in no instance", " idle"));
  find("#instances").replaceChildren(...boxes);
  find("#changes tbody").replaceChildren(...plan.history.slice(0, 20).map(change_row));
}

function box(plan, group, about, more = "") {
  const devices = group.map((rank) => make("span", { class: "device", text: `${rank} · ${plan.devices[rank]}` }));
  return make("div", { class: `instance${more}`, role: "listitem" }, make("p", { text: about }), ...devices);
}

function change_row(change) {
  const plan = change.before === change.plan || !change.before ? change.plan : `${change.before} to ${change.plan}`;
  const paused = change.pause_seconds === null ? "none" : seconds(change.pause_seconds);
  const cells = [clock(change.at), plan, change.reason].map((text) => make("td", { text }));
  const numbers = [seconds(change.seconds), paused].map((text) => make("td", { text, class: "number" }));
  return make("tr", {}, ...cells, ...numbers);
}

function showRequests({ timelines, now }) {
  const found = timelines.filter((one) => one.timeline.length).slice(0, 8);
  const empty = make("p", { class: "help", text: "None has run yet." });
  find("#timelines").replaceChildren(...(found.length ? found.map((one) => requestRow(one, now)) : [empty]));
}

function requestRow(one, now) {
  const bars = one.timeline.map(([kind, start, length]) => ({ refresh: kind === "refresh", start, length }));
  const from = bars[0].start;
  const to = Math.max(...bars.map((bar) => bar.start + bar.length), one.ended ? 0 : now);
  const steps = `${count(one.steps, "step")}, ${count(one.refreshes, "refresh step")}`;
  const facts = [one.ended ? "ended" : "running", `${one.tokens} of ${one.max_tokens} tokens`, steps, `threshold ${threshold(one.threshold)}`, seconds(to - from)];
  const about = make("p", {}, make("span", { class: "id", text: one.id.slice(0, 12) }), ...facts.map((text) => make("span", { text })));
  return make("div", { class: "request" }, about, track(bars, from, to, `Steps of request ${one.id.slice(0, 12)}: ${steps}`));
}
