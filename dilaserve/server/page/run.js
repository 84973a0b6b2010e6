// One answer: asked for, shown while it denoises, and its steps kept for looking at them again.

import { stream } from "./api.js";
import { draw, track } from "./canvas.js";
import { calm, count, fillTerms, make, seconds, threshold } from "./dom.js";

const PACE = 70; // ms between two steps on the screen, so that an eye can follow; less when many wait

export class Run {
  /** `asked`: the fields of the request beside the prompt; `title` names the run. */
  constructor(asked, title) {
    this.asked = asked;
    this.title = title;
    this.steps = []; // { canvas, at }, `at` in seconds since the request arrived
    this.text = "";
    this.end = null; // what the server says at the end
    this.shown = -1;
    this.build();
  }

  build() {
    this.canvas = make("div", { class: "canvas", "aria-hidden": "true" });
    this.answer = make("p", { class: "answer" });
    this.facts = make("dl", { class: "facts" });
    this.tracks = make("div");
    this.scrub = make("div", { class: "scrub" });
    this.scrub.hidden = true;
    this.table = make("details");
    this.table.hidden = true;
    const parts = [this.canvas, this.scrub, this.tracks, this.facts, this.table, this.answer];
    this.element = make("article", { class: "run", "aria-label": this.title }, make("h2", { text: this.title }), ...parts);
  }

  /** Ask, and show what comes. Throws `ApiError`; the run keeps what had come until then. */
  async start(path, body, signal) {
    const showing = this.play();
    try {
      for await (const chunk of stream(path, body, signal)) this.take(chunk);
    } finally {
      this.done = true;
      await showing;
      this.finish();
    }
  }

  take(chunk) {
    const [choice] = chunk.choices;
    this.text += choice?.delta?.content ?? choice?.text ?? "";
    if (chunk.dilaserve?.canvas) this.steps.push({ canvas: chunk.dilaserve.canvas, at: chunk.dilaserve.canvas.seconds });
    else if (chunk.dilaserve) this.end = { ...chunk.dilaserve, reason: choice.finish_reason };
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
  }

  /** Show step after step until all have been shown that came. */
  async play() {
    while (!this.done || this.shown < this.steps.length - 1) {
      const waiting = this.steps.length - 1 - this.shown;
      if (waiting > 0) this.show(calm() ? this.steps.length - 1 : this.shown + 1);
      await new Promise((resolve) => setTimeout(resolve, calm() ? 30 : PACE / Math.max(1, waiting / 8)));
    }
  }

  show(index) {
    this.shown = index;
    draw(this.canvas, this.steps, index);
    const refreshes = this.steps.slice(0, index + 1).filter((step) => step.canvas.refresh).length;
    this.describe(index + 1, refreshes);
    this.tracks.replaceChildren(this.track(index));
  }

  describe(steps, refreshes) {
    const last = this.steps[steps - 1];
    const pairs = [["Steps", steps], ["Refreshes", refreshes], ["Threshold", threshold(last?.canvas.threshold)]];
    if (this.end) pairs.push(...this.result());
    fillTerms(this.facts, pairs);
  }

  result() {
    const { queued, served, mean_confidence: sure, deadline, deadline_met: met } = this.end;
    const pairs = [["Tokens", this.tokens ?? "–"], ["Took", seconds(queued + served)], ["Confidence", sure?.toFixed(2) ?? "–"]];
    if (deadline) pairs.push([`Deadline ${seconds(deadline)}`, met ? "met" : "missed"]);
    return pairs;
  }

  track(index) {
    const bars = this.steps.slice(0, index + 1).map(({ canvas, at }, place) => {
      const start = place ? this.steps[place - 1].at : 0;
      return { refresh: canvas.refresh, start, length: at - start };
    });
    const refreshes = bars.filter((bar) => bar.refresh).length;
    const about = `${count(bars.length, "step")}, of them ${count(refreshes, "refresh step")}`;
    return track(bars, 0, this.steps.at(-1).at, about);
  }

  finish() {
    this.answer.textContent = this.text;
    if (!this.steps.length) return;
    this.show(this.steps.length - 1);
    this.addScrub();
    this.addTable();
  }

  addScrub() {
    const last = this.steps.length - 1;
    const label = make("span", { text: `Step ${last + 1} of ${last + 1}` });
    const range = make("input", { type: "range", min: 1, max: last + 1, step: 1, value: last + 1, "aria-label": `Step of ${this.title}` });
    range.addEventListener("input", () => {
      this.show(range.valueAsNumber - 1);
      label.textContent = `Step ${range.value} of ${last + 1}`;
    });
    this.scrub.replaceChildren(label, range);
    this.scrub.hidden = last < 1;
  }

  addTable() {
    const head = ["Step", "Kind", "Unmasked", "Masks left", "Threshold", "After"].map((text) => make("th", { text, scope: "col" }));
    let before = new Map();
    const rows = this.steps.map(({ canvas, at }) => {
      const masks = canvas.masked.filter(Boolean).length;
      const unmasked = (before.get(canvas.block) ?? canvas.masked.length) - masks;
      before.set(canvas.block, masks);
      const kind = canvas.kind === "commit" ? `commit, ${canvas.refresh ? "refresh" : "reuse"}` : canvas.kind;
      const cells = [canvas.step, kind, unmasked, masks, threshold(canvas.threshold), seconds(at)];
      return make("tr", {}, ...cells.map((text) => make("td", { text })));
    });
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
    const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Steps of ${this.title}` }, table);
    this.table.replaceChildren(make("summary", { text: "Steps as a table" }), scroll);
    this.table.hidden = false;
  }

  /** Show the answer with the parts that another one does not share marked. */
  mark(parts) {
    this.answer.replaceChildren(...parts.map(({ text, shared }) => (shared || !text.trim() ? text : make("mark", { text }))));
  }

  fail(message) {
    this.element.append(make("p", { class: "failure", text: message }));
  }
}
