// Requests to this server: the key, event streams, and errors in words.

import { askForKey } from "./key.js";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const STORE = "dilaserve-key";
let key = sessionStorage.getItem(STORE);

/** Fetch with the key; asks for one where the server wants it. Throws `ApiError`. */
export async function call(path, options = {}) {
  for (;;) {
    const sent = key;
    const headers = { accept: "application/json", ...options.headers };
    if (sent) headers.authorization = `Bearer ${sent}`;
    const response = await reach(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (key === sent) {
      key = await askForKey(sent !== null);
      sessionStorage.setItem(STORE, key);
    }
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. It may have stopped, or the network is down.", 0);
  }
}

/** What the server says of an error, with the time after which another try makes sense. */
async function failure(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const after = response.headers.get("retry-after");
  const hint = after ? ` Try again in ${after} s.` : "";
  return new ApiError(sentence(message) + hint, response.status);
}

export function sentence(text) {
  const said = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(said) ? said : `${said}.`;
}

export async function get(path) {
  return (await call(path)).json();
}

/** The data objects of an event stream. Throws `ApiError`, also for an error inside the stream. */
export async function* stream(path, body, signal) {
  const headers = { "content-type": "application/json", accept: "text/event-stream" };
  const response = await call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue;
    const data = line.slice(6);
    if (data === "[DONE]") return;
    const found = JSON.parse(data);
    if (found.error) throw new ApiError(sentence(found.error.message), 500);
    yield found;
  }
  throw new ApiError("The server closed the stream before the answer was finished.", 0);
}

async function* lines(source) {
  const reader = source.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}
