// Which adapters there are and what they do; loading and unloading with the admin token, which stays in memory.

import { call } from "./api.js";
import { confirm } from "./dialog.js";
import { announce, el, svg } from "./dom.js";
import { hue, rank } from "./picker.js";
import { look, onStatus, seen } from "./watch.js";
import { bytes, duration, number, onSwitch, percent, t } from "./words.js";

const MOST = 200;
const STORED = "lofi.admin";
const COLUMNS = ["name", "state", "rank", "bytes", "modules", "share", "requests", "tokens", "loaded"];

const summary = el("p", { class: "quiet" });
const filter = el("input", { type: "search", "aria-label": () => t("pick.filter"), placeholder: () => t("pick.filter") });
const body = el("tbody", { role: "rowgroup" });
const nothing = el("p", { class: "empty-line quiet" }, () => t("adapters.none"));
const message = el("p", { class: "message", hidden: true });
const closed = el("p", { class: "card quiet" }, () => t("admin.closed"));
const rows = new Map();
let form;

export function adapters(view) {
  form = loader();
  view.append(
    el("header", { class: "page-head" }, el("div", {}, el("h2", {}, () => t("tab.adapters")), summary), filter),
    table(), nothing, message, form.node, closed,
  );
  filter.addEventListener("input", draw);
  onStatus(({ status }) => { if (status) draw(); });
  onSwitch(draw);
  return { shown: look };
}

function table() {
  const heads = COLUMNS.map((name) => el("th", { scope: "col", role: "columnheader", class: numeric(name) }, () => t(`adapters.${name}`)));
  const last = el("th", { scope: "col", role: "columnheader" }, el("span", { class: "unseen" }, () => t("adapters.unload")));
  return el(
    "div", { class: "card table" },
    el("table", { role: "table", class: "stacks" }, el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads, last)), body),
  );
}

const numeric = (name) => (["rank", "bytes", "requests", "tokens"].includes(name) ? "number" : "");

function draw() {
  const { status } = seen;
  if (!status) return;
  const wanted = filter.value.trim().toLowerCase();
  const all = [baseOf(status), ...status.adapters];
  const shown = all.filter((item) => item.name.toLowerCase().includes(wanted)).slice(0, MOST + 1);
  const names = new Set(shown.map((item) => item.name));
  for (const [name, row] of rows) if (!names.has(name)) { row.node.remove(); rows.delete(name); }
  shown.forEach((item, i) => {
    if (!rows.has(item.name)) rows.set(item.name, rowOf(item));
    const row = rows.get(item.name);
    fill(row, item, status);
    if (body.children[i] !== row.node) body.insertBefore(row.node, body.children[i] ?? null);
  });
  filter.hidden = status.adapters.length <= 8;
  nothing.hidden = shown.length > 0 && status.adapters.length > 0;
  form.node.hidden = !status.admin;
  closed.hidden = status.admin;
  summary.textContent = described(status, shown.filter((item) => !item.base).length);
}

/** The base as a row: what it answered itself. */
function baseOf({ model, base, engine }) {
  const whole = Object.values(engine.finished).reduce((sum, n) => sum + n, 0);
  return { name: model, base: true, requests: base.requests, tokens: base.tokens, share: whole ? base.requests / whole : 0 };
}

function described({ adapters: all }, shown) {
  const states = ["device", "host", "disk"].map((state) => [state, all.filter((item) => item.state === state).length]);
  const parts = [t("adapters.count", { n: all.length }), ...states.filter(([, n]) => n).map(([state, n]) => t(`adapters.on.${state}`, { n }))];
  if (all.length) parts.push(bytes(all.reduce((sum, item) => sum + item.bytes, 0)));
  if (shown < all.length) parts.push(t("adapters.shown", { n: shown }));
  return parts.join(" · ");
}

function rowOf({ name, base = false }) {
  const cells = Object.fromEntries(COLUMNS.map((column) => [column, el("td", { role: "cell", class: `${numeric(column)} cell-${column}`, "data-head": () => t(`adapters.${column}`) })]));
  cells.name.setAttribute("role", "rowheader");
  cells.name.append(el("span", { class: `nameplate ${hue(name, seen.status.model)}` }, el("span", { class: "dot", "aria-hidden": "true" }), el("span", { class: "mono" }, name)));
  const chip = el("span", { class: "chip" });
  cells.state.append(chip);
  const fraction = svg("rect", { height: "100%", width: "0", rx: "3" });
  const share = el("span", { class: "share-number" });
  cells.share.append(el("span", { class: `share ${hue(name, seen.status.model)}` }, svg("svg", { class: "share-bar", "aria-hidden": "true" }, fraction), share));
  const unload = el(
    "button", { type: "button", class: "button small", "aria-label": () => t("adapters.unload.name", { name }), on: { click: () => form.unload(name, unload) } },
    () => t("adapters.unload"),
  );
  const last = el("td", { role: "cell", class: "cell-action" }, base ? null : unload);
  return { node: el("tr", { role: "row", "data-name": name }, ...Object.values(cells), last), cells, chip, fraction, share, unload };
}

function fill(row, item, status) {
  const state = item.base ? "base" : item.state;
  put(row.chip, t(`adapters.state.${state}`));
  row.chip.dataset.state = state;
  put(row.cells.rank, item.base ? "" : number(item.rank));
  put(row.cells.bytes, item.base ? "" : bytes(item.bytes));
  put(row.cells.modules, item.base ? "" : item.modules.map((module) => module.replace(/_proj$/, "")).join(" "));
  if (!item.base) row.cells.modules.title = item.modules.join(" ");
  put(row.cells.requests, number(item.requests));
  put(row.cells.tokens, number(item.tokens));
  put(row.cells.loaded, item.base ? "" : t("time.ago", { time: duration(Math.max(0, Date.now() / 1000 - item.loaded_at)) }));
  put(row.share, percent(item.share));
  row.fraction.setAttribute("width", `${(100 * item.share).toFixed(2)}%`);
  row.unload.hidden = !status.admin;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function say(text, kind) {
  message.hidden = false;
  message.dataset.kind = kind;
  message.setAttribute("role", kind === "fault" ? "alert" : "note");
  message.textContent = text;
  if (kind !== "fault") announce(text);
}

/** The form that loads, and what its token also allows: unloading. */
function loader() {
  const name = el("input", { id: "load-name", required: true, autocomplete: "off", spellcheck: "false", autocapitalize: "off" });
  const folder = el("input", { id: "load-folder", required: true, autocomplete: "off", spellcheck: "false", autocapitalize: "off", class: "mono" });
  const token = el("input", { id: "admin-token", type: "password", required: true, autocomplete: "off", spellcheck: "false" });
  const keep = el("input", { type: "checkbox", id: "keep-token" });
  const load = el("button", { class: "button primary" }, () => t("admin.load"));
  const node = el(
    "form", { class: "card load", "aria-labelledby": "load-title" },
    el("h3", { id: "load-title" }, () => t("admin.title")), el("p", { class: "quiet small" }, () => t("admin.text")),
    el("div", { class: "load-fields" }, labelled("load-name", "admin.name", name), labelled("load-folder", "admin.folder", folder), labelled("admin-token", "admin.token", token)),
    el("div", { class: "load-end" }, el("label", { class: "check" }, keep, () => t("admin.keep")), load),
  );
  token.value = session("get") ?? "";
  keep.checked = token.value !== "";
  const store = () => (keep.checked && token.value ? session("set", token.value) : session("remove"));
  for (const one of [keep, token]) one.addEventListener("change", store);
  node.addEventListener("submit", async (event) => {
    event.preventDefault();
    const asked = { lora_name: name.value.trim(), lora_path: folder.value.trim() };
    if (!(await act(load, "/v1/load_lora_adapter", asked, token.value, "admin.loading"))) return;
    const item = seen.status?.adapters.find((one) => one.name === asked.lora_name);
    say(item ? t("admin.loaded.as", { name: item.name, rank: rank(item), size: bytes(item.bytes) }) : t("admin.loaded", { name: asked.lora_name }), "fine");
    for (const input of [name, folder]) input.value = "";
    name.focus();
  });

  async function unload(which, control) {
    if (!token.value) { say(t("admin.token.first"), "fault"); token.focus(); return; }
    if (!(await confirm({ title: () => t("unload.title", { name: which }), text: () => t("unload.text"), action: () => t("adapters.unload") }))) return;
    if (await act(control, "/v1/unload_lora_adapter", { lora_name: which }, token.value, "admin.unloading")) {
      say(t("admin.unloaded", { name: which }), "fine");
      name.focus();
    }
  }
  return { node, unload };
}

/** Whether the server did it; its reason is shown where it did not. */
async function act(control, path, asked, token, doing) {
  control.disabled = true;
  say(t(doing, { name: asked.lora_name }), "busy");
  try {
    await call(path, { method: "POST", body: asked, bearer: token });
    await look();
    return true;
  } catch (error) {
    say(error.message, "fault");
    return false;
  } finally {
    control.disabled = false;
  }
}

const labelled = (id, key, input) => el("div", { class: "field" }, el("label", { for: id }, () => t(key)), input);

function session(verb, value) {
  try { return sessionStorage[`${verb}Item`](STORED, value); } catch { return null; }  // it may be switched off
}
