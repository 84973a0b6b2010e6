// Elements and numbers as text. All text goes in as text, never as HTML.

export const find = (selector) => document.querySelector(selector);

/** An element with a class, text or children. */
export function make(tag, options = {}, ...children) {
  const { class: name, text, ...attributes } = options;
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Pairs of a name and a value, as the terms of a description list. */
export function fillTerms(list, pairs) {
  list.replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(2)} s` : `${Math.round(value)} s`;
}

export function share(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
}

export const threshold = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));

export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

export const clock = (unix) => new Date(1000 * unix).toLocaleTimeString();

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
