// Starts the page: words, tabs, appearance, the state of the server; each view is a module of its own.

import { adapters } from "./adapters.js";
import { enterKey } from "./api.js";
import { chat } from "./chat.js";
import { compare } from "./compare.js";
import { icon } from "./dom.js";
import { live } from "./live.js";
import { look, onStatus, setPace } from "./watch.js";
import { bind, language, remember, speak, t } from "./words.js";

const VIEWS = { chat, compare, adapters, live };
const PACE = { chat: 5000, compare: 5000, adapters: 1000, live: 1000 };
const THEMES = ["auto", "light", "dark"];
const get = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
const made = {};

async function begin() {
  await speak(language());
  for (const [name, make] of Object.entries(VIEWS)) made[name] = make(get(name));
  languages();
  appearance();
  tabList();
  onStatus(showHealth);
  const wanted = location.hash.slice(1);
  select(wanted in VIEWS ? wanted : "chat", { focus: false });
  if (matchMedia("(pointer: fine)").matches) document.querySelector(".view:not([hidden]) .composer textarea")?.focus();
}

function tabList() {
  const moves = { ArrowRight: (i) => i + 1, ArrowLeft: (i) => i - 1, Home: () => 0, End: () => -1 };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => select(tab.getAttribute("aria-controls"), { focus: false }));
    tab.addEventListener("keydown", (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = tabs.at(moves[event.key](i) % tabs.length);
      select(next.getAttribute("aria-controls"), { focus: true });
    });
  });
  addEventListener("hashchange", () => { if (location.hash.slice(1) in VIEWS) select(location.hash.slice(1), { focus: false }); });
}

/** Shows one view. By keyboard the focus stays on the tabs, so that the arrows go on. */
function select(name, { focus }) {
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    get(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${name}`);
  made[name].shown();
  setPace(PACE[name]);
  if (focus) get(`tab-${name}`).focus();
}

function languages() {
  const buttons = [...document.querySelectorAll("[data-language]")];
  const show = () => buttons.forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.language === language())));
  for (const one of buttons) {
    one.addEventListener("click", async () => { await speak(one.dataset.language); remember(one.dataset.language); show(); });
  }
  show();
}

function appearance() {
  const root = document.documentElement;
  const current = () => root.dataset.theme ?? "auto";
  const control = get("theme");
  const say = () => t(`theme.${current()}`);
  const show = () => {
    control.replaceChildren(icon(current()));
    for (const name of ["aria-label", "title"]) bind(control, name, say);
  };
  control.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(current()) + 1) % THEMES.length];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    try { localStorage.setItem("lofi.theme", next); } catch { /* it then lasts as long as the page */ }
    show();
  });
  show();
}

/** The lamp in the header, and a banner where something needs to be known. */
function showHealth({ status, error }) {
  const state = error ? (error.status === 401 ? "locked" : "lost") : status.draining ? "draining" : "ready";
  if (status) {
    get("model").textContent = status.model;
    document.title = `${status.model} · lofi`;
  }
  get("health").dataset.state = state;
  bind(get("health-text"), "text", () => t(`health.${state}`));
  const lost = () => t("banner.lost", { reason: error.message });
  const words = { lost, locked: () => t("banner.locked"), draining: () => t("banner.draining") };
  get("banner").hidden = state === "ready";
  if (state !== "ready") bind(get("banner-text"), "text", words[state]);
  get("banner-key").hidden = state !== "locked";
  get("banner-key").onclick = async () => { if (await enterKey()) look(); };
}

begin();
