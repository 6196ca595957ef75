// Which adapters there are, where they are held, and what share of the traffic each has. loading.js changes what there is.

import { el } from "./dom.js";
import { form, message, unload } from "./loading.js";
import { hue } from "./picker.js";
import { bar, cell, table } from "./table.js";
import { onStatus, seen } from "./watch.js";
import { bytes, duration, number, onSwitch, percent, t } from "./words.js";

const MOST = 200;
const NAMES = ["name", "state", "rank", "bytes", "modules", "share", "requests", "tokens", "loaded"];
const COLUMNS = NAMES.map((name) => [`adapters.${name}`, ["rank", "bytes", "requests", "tokens"].includes(name)]);

const summary = el("p", { class: "quiet" });
const filter = el("input", { type: "search", "aria-label": () => t("pick.filter"), placeholder: () => t("pick.filter") });
const nothing = el("p", { class: "empty-line quiet" }, () => t("adapters.none"));
const closed = el("p", { class: "card quiet" }, () => t("admin.closed"));
const { node: list, body } = table([...COLUMNS, ["adapters.unload", false, true]], nothing);
const rows = new Map();

export function adapters(view) {
  const head = el("header", { class: "page-head" }, el("div", {}, el("h2", {}, () => t("tab.adapters")), summary), filter);
  view.append(head, list, message, form, closed);
  filter.addEventListener("input", draw);
  onStatus(draw);
  onSwitch(draw);
  return { shown: draw };
}

function draw() {
  const { status } = seen;
  if (!status) return;
  const wanted = filter.value.trim().toLowerCase();
  const fitting = [baseOf(status), ...status.adapters].filter((item) => item.name.toLowerCase().includes(wanted));
  const shown = fitting.slice(0, MOST + 1);
  place(shown, status);
  filter.hidden = status.adapters.length <= 8;
  nothing.hidden = shown.length > 0 && status.adapters.length > 0;
  form.hidden = !status.admin;
  closed.hidden = status.admin;
  summary.textContent = described(status, shown.filter((item) => !item.base).length);
}

/** The base as a row: what it answered itself. */
function baseOf({ model, base, engine }) {
  const whole = Object.values(engine.finished).reduce((sum, n) => sum + n, 0);
  return { name: model, base: true, requests: base.requests, tokens: base.tokens, share: whole ? base.requests / whole : 0 };
}

/** Rows stay the same nodes from poll to poll, so that the focus stays where it is. */
function place(shown, status) {
  const names = new Set(shown.map((item) => item.name));
  for (const [name, row] of rows) if (!names.has(name)) { row.node.remove(); rows.delete(name); }
  shown.forEach((item, i) => {
    if (!rows.has(item.name)) rows.set(item.name, rowOf(item, status.model));
    const row = rows.get(item.name);
    fill(row, item, status.admin);
    if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
  });
}

function described({ adapters: all }, shown) {
  const parts = [t("adapters.count", { n: all.length })];
  for (const state of ["device", "host", "disk"]) {
    const n = all.filter((item) => item.state === state).length;
    if (n) parts.push(t(`adapters.on.${state}`, { n }));
  }
  if (all.length) parts.push(bytes(all.reduce((sum, item) => sum + item.bytes, 0)));
  if (shown < all.length) parts.push(t("adapters.shown", { n: shown }));
  return parts.join(" · ");
}

function rowOf({ name, base = false }, model) {
  const colour = hue(name, model);
  const cells = Object.fromEntries(NAMES.map((column, i) => [column, cell(...COLUMNS[i])]));
  const dot = el("span", { class: "dot", "aria-hidden": "true" });
  cells.name.append(el("span", { class: `nameplate ${colour}` }, dot, el("span", { class: "mono" }, name)));
  const chip = el("span", { class: "chip" });
  cells.state.append(chip);
  const share = bar();
  const percentage = el("span", { class: "share-number" });
  cells.share.append(el("span", { class: `share ${colour}` }, share.node, percentage));
  const label = () => t("adapters.unload.name", { name });
  const click = () => unload(name, button);
  const button = el("button", { type: "button", class: "button small", "aria-label": label, on: { click } }, () => t("adapters.unload"));
  const last = el("td", { role: "cell", class: "cell-action" }, base ? null : button);
  return { node: el("tr", { role: "row", "data-name": name }, ...Object.values(cells), last), cells, chip, share, percentage, button };
}

function fill({ cells, chip, share, percentage, button }, item, admin) {
  const state = item.base ? "base" : item.state;
  put(chip, t(`adapters.state.${state}`));
  chip.dataset.state = state;
  put(cells.requests, number(item.requests));
  put(cells.tokens, number(item.tokens));
  put(percentage, percent(item.share));
  share.set(item.share);
  if (item.base) return;
  put(cells.rank, number(item.rank));
  put(cells.bytes, bytes(item.bytes));
  put(cells.modules, item.modules.map((module) => module.replace(/_proj$/, "")).join(" "));
  cells.modules.title = item.modules.join(" ");
  put(cells.loaded, t("time.ago", { time: duration(Math.max(0, Date.now() / 1000 - item.loaded_at)) }));
  button.hidden = !admin;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
