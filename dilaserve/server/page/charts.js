// The charts of the last ten minutes, by plotly.js, which the server has from its own package.

import { calm, find, make, seconds, share, threshold } from "./dom.js";

const GROUP = 10; // seconds that one bar of the deadlines stands for
const last = (values) => values.findLast((value) => value !== null) ?? null;
const sum = (values) => values.reduce((total, value) => total + value, 0);

const CHARTS = [
  {
    id: "arrivals",
    title: "Arrivals a second",
    now: (history) => `${last(history.arrivals) ?? 0} now`,
    traces: (history, times, ink) => [line("arrivals", times, history.arrivals, ink.accent, { shape: "hv", fill: "tozeroy" })],
    axis: { rangemode: "tozero" },
  },
  {
    id: "attainment",
    title: "Deadlines, by ten seconds",
    now: (history) => {
      const [met, all] = [sum(history.met), sum(history.met) + sum(history.late) + sum(history.declined)];
      return all ? `${share(met / all)} met` : "none came";
    },
    traces: (history, times, ink) => [
      bars("met", times, history.met, ink.accent, ""),
      bars("late", times, history.late, ink.bad, "/"),
      bars("declined", times, history.declined, ink.soft, "x"),
    ],
    axis: { rangemode: "tozero" },
    layout: { barmode: "stack" },
  },
  {
    id: "latency",
    title: "Latency of answers",
    now: (history) => `median ${seconds(last(history.p50))}`,
    traces: (history, times, ink) => [
      line("50 %", times, history.p50, ink.accent),
      line("90 %", times, history.p90, ink.accent, { dash: "dash" }),
      line("99 %", times, history.p99, ink.accent, { dash: "dot" }),
    ],
    axis: { rangemode: "tozero", ticksuffix: " s" },
  },
  {
    id: "thresholds",
    title: "Threshold in force",
    now: (history) => `mean ${threshold(last(history.threshold))}`,
    traces: (history, times, ink) => [
      line("mean", times, history.threshold, ink.accent),
      line("lowest", times, history.lowest_threshold, ink.accent, { dash: "dot" }),
    ],
    axis: { range: [0, 1.02] },
  },
  {
    id: "tokens",
    title: "Tokens a second",
    now: (history) => `${last(history.tokens) ?? 0} now`,
    traces: (history, times, ink) => [line("tokens", times, history.tokens, ink.accent, { fill: "tozeroy" })],
    axis: { rangemode: "tozero" },
  },
  {
    id: "budget",
    title: "Accuracy budget used",
    now: (history) => (last(history.budget_used) === null ? "no limit is set" : share(last(history.budget_used))),
    traces: (history, times, ink) => [line("used", times, history.budget_used, ink.accent, { fill: "tozeroy" })],
    axis: { range: [0, 1.02], tickformat: ".0%" },
  },
];

function line(name, x, y, color, { dash = "solid", shape = "linear", fill = "none" } = {}) {
  return { name, x, y, mode: "lines", line: { color, dash, shape, width: 2 }, fill, fillcolor: faint(color) };
}

/** A color of the style sheet, #rrggbb, at 18 %. */
const faint = (color) => `${color}2e`;

function bars(name, times, values, color, pattern) {
  const [x, y] = [[], []];
  for (let end = times.length; end > 0; end -= GROUP) {
    const begin = Math.max(0, end - GROUP);
    x.unshift(times[begin]);
    y.unshift(sum(values.slice(begin, end)));
  }
  return { name, type: "bar", x, y, marker: { color, pattern: { shape: pattern } } };
}

/** The colors of the style sheet, as they are now. */
function colors() {
  const style = getComputedStyle(document.documentElement);
  const named = ["ink", "soft", "line", "accent", "bad"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]);
  return Object.fromEntries(named);
}

function layout(chart, ink, named, width) {
  const axis = { gridcolor: ink.line, linecolor: ink.line, zerolinecolor: ink.line, tickfont: { color: ink.soft }, fixedrange: true };
  return {
    font: { family: "system-ui, sans-serif", size: 12, color: ink.soft },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 46, r: 8, t: 26, b: 26 },
    showlegend: named,
    legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: ink.line, font: { color: ink.ink } },
    xaxis: { ...axis, showgrid: false, type: "date", nticks: width < 420 ? 3 : 5, tickangle: 0, tickformat: "%H:%M:%S" },
    yaxis: { ...axis, nticks: 5, ...chart.axis },
    ...chart.layout,
  };
}

let library = null; // a promise of plotly.js, loaded once

function load() {
  library ??= new Promise((resolve, reject) => {
    const script = make("script", { src: "static/plotly.min.js" });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => reject(new Error("The chart library could not be loaded.")));
    document.head.append(script);
  });
  return library;
}

let seen = false; // whether the charts are on the screen

export function startCharts() {
  find("#charts").replaceChildren(...CHARTS.map(figure));
  new IntersectionObserver(([entry]) => (seen = entry.isIntersecting), { rootMargin: "200px" }).observe(find("#charts"));
}

function figure({ id, title }) {
  const plot = make("div", { class: "plot", id: `chart-${id}`, role: "img", "aria-label": title });
  return make("figure", { class: "chart" }, make("figcaption", { text: title }, make("span")), plot);
}

/** Draw the history; only while somebody can see it. `mayLoad`: the library may be loaded, which keeps a browser busy. */
export async function drawCharts(history, mayLoad) {
  for (const { id, now, title } of CHARTS) {
    const plot = find(`#chart-${id}`);
    plot.parentElement.querySelector("figcaption span").textContent = now(history);
    plot.setAttribute("aria-label", `${title}: ${now(history)}`);
  }
  if (!seen || !(library || mayLoad)) return;
  const plotly = await load();
  const times = history.at.map((at) => new Date(1000 * at));
  const ink = colors();
  for (const chart of CHARTS) {
    const traces = chart.traces(history, times, ink);
    const settings = { displayModeBar: false, responsive: true, staticPlot: calm() };
    const plot = find(`#chart-${chart.id}`);
    await plotly.react(plot, traces, layout(chart, ink, traces.length > 1, plot.clientWidth), settings);
  }
}
