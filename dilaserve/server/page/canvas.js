// Draws the canvas of an answer after one of its steps, and the steps as a track.

import { make, makeSvg, seconds } from "./dom.js";

const LEVELS = [0.6, 0.8, 0.95]; // confidences at which the shade of a token changes

export const level = (confidence) => LEVELS.filter((least) => confidence >= least).length;

/** The latest canvas of each block after step `index`, and before it. */
function blocksAt(steps, index) {
  const blocks = new Map();
  for (const { canvas } of steps.slice(0, index + 1)) {
    blocks.set(canvas.block, { now: canvas, before: blocks.get(canvas.block)?.now ?? null });
  }
  return [...blocks.values()];
}

/** Draw the canvas after step `index` of the recorded ones; what that step unmasked is shown as fresh. */
export function draw(container, steps, index) {
  const newest = steps[index]?.canvas;
  const pieces = [];
  for (const { now, before } of blocksAt(steps, index)) {
    now.tokens.forEach((token, place) => {
      const fresh = now === newest && token !== null && (before ? before.masked[place] !== false : true);
      pieces.push(piece(token, now.confidences[place], fresh));
    });
  }
  container.replaceChildren(...pieces);
}

function piece(token, confidence, fresh) {
  if (token === null) return make("span", { class: "token mask" });
  const name = `token sure-${level(confidence)}${fresh ? " fresh" : ""}`;
  return make("span", { class: name, text: token, title: `confidence ${confidence.toFixed(3)}` });
}

/** Bars of steps over time: `{ refresh, start, length }` in seconds from `from` to `to`; refresh steps are taller. */
export function track(bars, from, to, about) {
  const width = Math.max(1e-6, to - from);
  const place = (time) => (1000 * (time - from)) / width;
  const shapes = bars.map((bar) => {
    const name = bar.refresh ? "refresh" : "reuse";
    const size = bar.refresh ? { y: 1, height: 22 } : { y: 6, height: 12 };
    const x = place(bar.start);
    const box = { x, width: Math.max(1.5, place(bar.start + bar.length) - x - 1), ...size, class: name };
    return makeSvg("rect", box, makeSvg("title"));
  });
  shapes.forEach((shape, index) => {
    shape.firstChild.textContent = `${bars[index].refresh ? "refresh" : "reuse"} step, ${seconds(bars[index].length)}`;
  });
  const rail = makeSvg("rect", { x: 0, y: 11, width: 1000, height: 2, class: "rail" });
  const attributes = { class: "track", viewBox: "0 0 1000 24", preserveAspectRatio: "none", role: "img", "aria-label": about };
  return makeSvg("svg", attributes, rail, ...shapes);
}
