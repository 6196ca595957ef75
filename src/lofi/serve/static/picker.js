// A list of the base and its adapters to choose one (radio) or several (checkbox) from; filters when it is long.
// A chosen adapter that is unloaded stays chosen and says that it is gone: nothing else answers in its place.

import { el } from "./dom.js";
import { bytes, figure, t } from "./words.js";

const LONG = 8;
const MOST = 200;
const hues = new Map();

/** The colour that stands for an adapter everywhere on the page; the base is grey. */
export function hue(name, model) {
  if (name === model) return "hue-base";
  if (!hues.has(name)) hues.set(name, `hue-${hues.size % 8}`);
  return hues.get(name);
}

export function pick({ kind, name, label, initial, changed }) {
  const chosen = new Set();
  const rows = new Map();
  const list = el("div", { class: "pick-list", role: kind === "radio" ? "radiogroup" : "group", "aria-label": label });
  const words = () => t("pick.filter");
  const filter = el("input", { type: "search", class: "pick-filter", "aria-label": words, placeholder: words, hidden: true });
  const more = el("p", { class: "quiet small", hidden: true });
  const node = el("div", { class: "pick" }, filter, list, more);
  let known = [];
  let model = null;

  function row(item) {
    const input = el("input", { type: kind, name, value: item.name });
    const meta = el("span", { class: "pick-meta quiet" });
    const dot = el("span", { class: `dot ${hue(item.name, model)}`, "aria-hidden": "true" });
    const label = el("label", { class: "pick-row" }, input, dot, el("span", { class: "pick-name mono" }, item.name), meta);
    input.addEventListener("change", () => {
      if (kind === "radio") chosen.clear();
      if (input.checked) chosen.add(item.name); else chosen.delete(item.name);
      changed?.();
    });
    return { input, meta, node: label };
  }

  function draw() {
    const wanted = filter.value.trim().toLowerCase();
    const lost = [...chosen].filter((one) => !known.some((item) => item.name === one));
    const gone = lost.map((one) => ({ name: one, gone: true }));
    const fitting = [...known, ...gone].filter((item) => item.name.toLowerCase().includes(wanted));
    const shown = fitting.slice(0, MOST);
    filter.hidden = known.length <= LONG;
    more.hidden = fitting.length <= MOST;
    if (!more.hidden) more.textContent = t("pick.more", { shown: shown.length, n: fitting.length });
    const nodes = shown.map((item) => {
      if (!rows.has(item.name)) rows.set(item.name, row(item));
      const made = rows.get(item.name);
      made.input.checked = chosen.has(item.name);
      made.meta.textContent = about(item, model);
      made.node.classList.toggle("gone", Boolean(item.gone));
      return made.node;
    });
    if (nodes.length !== list.children.length || nodes.some((one, i) => one !== list.children[i])) list.replaceChildren(...nodes);
  }

  filter.addEventListener("input", draw);
  return {
    node,
    /** The chosen names, in the list's order. */
    chosen: () => [...known.map((item) => item.name), ...chosen].filter((one, i, all) => chosen.has(one) && all.indexOf(one) === i),
    update(status) {
      const first = model === null;
      model = status.model;
      known = [{ name: model }, ...status.adapters];
      if (first) initial(status).forEach((one) => chosen.add(one));
      draw();
    },
    redraw: draw,
  };
}

function about(item, model) {
  if (item.gone) return t("pick.gone");
  if (item.name === model) return t("pick.base");
  return `${rank(item)} · ${bytes(item.bytes)}`;
}

export const rank = (item) => (item.rank === null || item.rank === undefined ? "–" : t("rank", { r: figure(item.rank) }));
