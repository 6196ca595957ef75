// What the page says, in the language chosen, and how it writes numbers. Knows no view.
// Text that a script makes is given as a function and bound to its node, so a switch of language says it again.

const FILES = { en: "/static/en.json", vi: "/static/vi.json" };
const loaded = { [document.documentElement.lang]: await load(document.documentElement.lang) };  // before any view is made
const bound = new WeakMap();  // node -> Map(attribute or "text" -> function)
const switched = new Set();

export const language = () => document.documentElement.lang;

/** Loads a language and says everything on the page in it. */
export async function speak(code) {
  loaded[code] ??= await load(code);
  document.documentElement.lang = code;
  refresh();
  for (const listener of switched) listener(code);
}

async function load(code) {
  return (await fetch(FILES[code])).json();
}

export function remember(code) {
  try { localStorage.setItem("lofi.language", code); } catch { /* the choice then lasts as long as the page */ }
}

export const onSwitch = (listener) => switched.add(listener);

export const knows = (key) => key in (loaded[language()] ?? {});

/** The words of a key; `{name}` is replaced by values.name; `n` chooses between one and other. */
export function t(key, values = {}) {
  let words = loaded[language()]?.[key];
  if (words === undefined) throw new Error(`no words for ${key} in ${language()}`);
  if (typeof words === "object") words = words[new Intl.PluralRules(language()).select(values.n)] ?? words.other;
  return words.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? number(values[name]) : values[name]));
}

/** Sets a node's text or attribute to what a function says, now and after every switch. */
export function bind(node, what, say) {
  if (!bound.has(node)) bound.set(node, new Map());
  bound.get(node).set(what, say);
  node.dataset.live = "";
  put(node, what, say());
}

function put(node, what, value) {
  if (what === "text") {
    if (node.textContent !== value) node.textContent = value;
  } else node.setAttribute(what, value);
}

function refresh() {
  for (const node of document.querySelectorAll("[data-t]")) put(node, "text", t(node.dataset.t));
  for (const node of document.querySelectorAll("[data-t-label]")) put(node, "aria-label", t(node.dataset.tLabel));
  for (const node of document.querySelectorAll("[data-live]")) {
    for (const [what, say] of bound.get(node)) put(node, what, say());
  }
}

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language(), { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

/** Three significant digits at most: 0.42, 8.4, 123, 1,234. */
export const figure = (value) => number(value, value !== 0 && value < 1 ? 2 : value < 100 && value % 1 ? 1 : 0);

export const percent = (share) => `${number(100 * share, share > 0 && share < 0.0995 ? 1 : 0)} %`;

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  for (; count >= 1000 && power < units.length - 1; power++) count /= 1000;
  return `${number(count, power && count < 100 ? 1 : 0)} ${units[power]}`;
}

export const milliseconds = (value) =>
  value >= 10_000 ? `${number(value / 1000, 1)} s` : `${number(value, value < 10 ? 1 : 0)} ms`;

/** 42 s, 5 min, 3 h 20 min, 2 d 4 h */
export function duration(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return t("time.seconds", { s: whole });
  if (whole < 3600) return t("time.minutes", { m: Math.floor(whole / 60) });
  if (whole < 86400) return t("time.hours", { h: Math.floor(whole / 3600), m: Math.floor((whole % 3600) / 60) });
  return t("time.days", { d: Math.floor(whole / 86400), h: Math.floor((whole % 86400) / 3600) });
}
