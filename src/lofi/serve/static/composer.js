// What chat and side by side share: where a prompt is written (it grows; Enter sends, Shift+Enter breaks the line; the
// button stops what runs), and the column of choices beside it.

import { button, el } from "./dom.js";
import { panel } from "./settings.js";
import { t } from "./words.js";

export function composer({ id, label, send, stop, extra = [] }) {
  const input = el("textarea", { id, rows: "1", placeholder: label, "aria-label": label, autocomplete: "off" });
  const go = button("send", () => t("send"), submit, { kind: "primary send" });
  const halt = button("stop", () => t("stop"), stop, { kind: "primary halt" });
  const hint = el("span", { class: "hint quiet small" }, () => t("composer.hint"));
  const tools = el("div", { class: "composer-tools" }, ...extra, hint, go, halt);
  const node = el("div", { class: "composer" }, input, tools);
  halt.hidden = true;

  function submit() {
    if (go.hidden || !input.value.trim() || !send(input.value)) return;  // who refuses to send has shown why
    input.value = "";
    grow();
    input.focus();
  }
  function grow() {
    input.rows = 1;
    const { lineHeight, paddingTop, paddingBottom } = getComputedStyle(input);
    const height = input.scrollHeight - parseFloat(paddingTop) - parseFloat(paddingBottom);
    input.rows = Math.min(8, Math.max(1, Math.round(height / parseFloat(lineHeight))));
  }
  input.addEventListener("input", grow);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();  // while an input method composes (Vietnamese, say), Enter belongs to it
    submit();
  });
  return {
    node,
    input,
    busy(now) {
      const focused = document.activeElement === (now ? go : halt);
      go.hidden = now;
      halt.hidden = !now;
      if (focused) (now ? halt : input).focus();
    },
  };
}

/** What stands where nothing has been asked yet. */
export const nothingYet = (key) =>
  el("div", { class: "empty" }, el("h3", {}, () => t(key)), el("p", { class: "quiet" }, () => t(`${key}.text`)));

/** The column beside a view, who answers and the settings: on a narrow screen it lies over the view, behind a button. */
export function side(key, chooser) {
  const place = el("div");
  const parts = [el("h3", {}, () => t(key)), chooser, el("h3", {}, () => t("settings")), place];
  const close = button("close", () => t("close"), () => toggle(false), { kind: "side-close" });
  const node = el("aside", { class: "side", "aria-label": () => t("side") }, close, ...parts);
  const opener = button("settings", () => t("side"), () => toggle(!node.classList.contains("open")), { kind: "side-open" });
  opener.setAttribute("aria-expanded", "false");
  function toggle(open) {
    node.classList.toggle("open", open);
    opener.setAttribute("aria-expanded", String(open));
    (open ? close : opener).focus();
  }
  node.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && node.classList.contains("open")) { event.stopPropagation(); toggle(false); }
  });
  const covered = () => getComputedStyle(opener).display !== "none";
  return { node, opener, shown: () => place.append(panel), reveal() { if (covered()) toggle(true); } };
}
