// What the server says of itself: polls /v1/lofi/status while the page is visible and tells whoever listens.

import { call } from "./api.js";

const listeners = new Set();
export const seen = { status: null, error: null };
let pace = 5000;
let timer = null;
let underway = null;
let next = null;

export function onStatus(listener) {
  listeners.add(listener);
  if (seen.status || seen.error) listener(seen);
}

/** How many milliseconds lie between two polls; the next one is due at once. */
export function setPace(milliseconds) {
  pace = milliseconds;
  look();
}

/** Polls now, after a poll that is under way: what it tells may be older. While the page is hidden nothing is polled. */
export function look() {
  clearTimeout(timer);
  if (document.hidden) return Promise.resolve();
  if (underway === null) {
    underway = poll().finally(() => { underway = null; });
    return underway;
  }
  next ??= underway.then(() => { next = null; return look(); });
  return next;
}

async function poll() {
  const ask = seen.status === null && seen.error === null;  // only the first poll of all may ask for the key
  try {
    seen.status = await (await call("/v1/lofi/status", { ask })).json();
    seen.error = null;
  } catch (error) {
    seen.error = error;
  }
  for (const listener of listeners) listener(seen);
  timer = setTimeout(look, pace);
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : look()));
