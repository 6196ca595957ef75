// Where a prompt is written: grows with it, Enter sends, Shift+Enter breaks the line; the button stops what runs.

import { button, el } from "./dom.js";
import { t } from "./words.js";

export function composer({ id, label, send, stop, extra = [] }) {
  const input = el("textarea", { id, rows: "1", placeholder: label, "aria-label": label, autocomplete: "off" });
  const go = button("send", () => t("send"), submit, { kind: "primary send" });
  const halt = button("stop", () => t("stop"), stop, { kind: "primary halt" });
  const tools = el("div", { class: "composer-tools" }, ...extra, el("span", { class: "hint quiet small" }, () => t("composer.hint")), go, halt);
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

/** The column beside a view: on a narrow screen it lies over the view, behind a button. */
export function side(children) {
  const close = button("close", () => t("close"), () => toggle(false), { kind: "side-close" });
  const node = el("aside", { class: "side", "aria-label": () => t("side") }, close, ...children);
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
  return { node, opener };
}
