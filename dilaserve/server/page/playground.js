// The form, the run that it starts, and the second run beside it.

import { changedWords, compare } from "./difference.js";
import { count, find, make, threshold } from "./dom.js";
import { Run } from "./run.js";

let chats = true; // whether the model has a chat template
let first = null;
let busy = null; // of the request under way

export const isBusy = () => busy !== null;

export function describeModel(model) {
  chats = model.chats;
  find("#threshold").value = model.confidence_threshold;
  find("#max-tokens").value = Math.min(model.default_max_tokens, model.max_model_len);
  sayThresholds();
}

export function startPlayground() {
  for (const button of document.querySelectorAll(".examples button")) {
    button.addEventListener("click", () => {
      find("#prompt").value = button.textContent;
      find("#prompt").focus();
    });
  }
  for (const id of ["#threshold", "#other-threshold"]) find(id).addEventListener("input", sayThresholds);
  find("#adaptive").addEventListener("change", () => (find("#threshold").disabled = find("#adaptive").checked));
  find("#ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  find("#again").addEventListener("submit", (event) => {
    event.preventDefault();
    askAgain();
  });
  find("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("#ask").requestSubmit();
  });
  find("#stop").addEventListener("click", () => busy?.abort());
  sayThresholds();
}

function sayThresholds() {
  find("#threshold-value").textContent = threshold(find("#threshold").valueAsNumber);
  find("#other-value").textContent = threshold(find("#other-threshold").valueAsNumber);
}

/** The request's fields as the form has them. */
function asked() {
  const found = { prompt: find("#prompt").value, max_tokens: find("#max-tokens").valueAsNumber || undefined };
  if (!find("#adaptive").checked) found.confidence_threshold = find("#threshold").valueAsNumber;
  const deadline = find("#deadline").valueAsNumber;
  if (deadline) found.slo = { deadline_ms: deadline };
  return found;
}

async function ask() {
  if (busy) return;
  const fields = asked();
  const title = fields.confidence_threshold ? `Threshold ${threshold(fields.confidence_threshold)}` : "Threshold by the server";
  first = new Run(fields, title);
  find("#runs").replaceChildren(first.element);
  find("#difference").hidden = find("#again").hidden = true;
  find("#results").hidden = false;
  find("#again").hidden = !(await go(first));
}

async function askAgain() {
  if (busy || !first) return;
  const value = find("#other-threshold").valueAsNumber;
  const second = new Run({ ...first.asked, confidence_threshold: value }, `Threshold ${threshold(value)}`);
  find("#runs").replaceChildren(first.element, second.element);
  find("#difference").hidden = true;
  if (await go(second)) showDifference(first, second);
}

/** Whether the run came to its end. */
async function go(run) {
  busy = new AbortController();
  setBusy(true);
  say(`Asked. ${run.title}.`);
  try {
    await run.start(...wire(run.asked), busy.signal);
    say(`Answer after ${count(run.end?.steps ?? run.steps.length, "step")}: ${run.text}`);
    return true;
  } catch (error) {
    const message = error.name === "AbortError" ? "Stopped." : error.message;
    run.fail(message);
    say(message);
    return false;
  } finally {
    busy = null;
    setBusy(false);
  }
}

function wire({ prompt, ...fields }) {
  const body = { ...fields, stream: true, stream_options: { include_canvas: true, include_usage: true } };
  if (!chats) return ["v1/completions", { ...body, prompt }];
  return ["v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }];
}

function setBusy(on) {
  find("#run").disabled = find("#compare").disabled = on;
  find("#stop").disabled = !on;
}

function say(text) {
  find("#said").textContent = text;
}

function showDifference(left, right) {
  const [a, b] = compare(left.text, right.text);
  left.mark(a);
  right.mark(b);
  const changed = Math.max(changedWords(a), changedWords(b));
  const text = changed ? `${count(changed, "word")} differ${changed === 1 ? "s" : ""}, marked in both answers.` : "The answers are the same.";
  const [was, now] = [left.end.steps, right.end.steps];
  find("#difference").replaceChildren(make("p", { text: `${right.title}: ${count(now, "step")} instead of ${was}. ${text}` }));
  find("#difference").hidden = false;
  say(text);
}
