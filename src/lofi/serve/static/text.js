// Shows what a model said. Everything is text; only fenced code, inline code and line breaks get a form.

import { announce, button, el, icon } from "./dom.js";
import { t } from "./words.js";

const FENCE = /^ {0,3}```[^\S\n]*([\w+#.-]*)[^\n]*$/;

/** Puts an answer into a node, as paragraphs and code blocks; a fence that is still open is code already. */
export function render(node, text) {
  const parts = blocks(text).map(({ code, language, body }) => (code ? codeBlock(body, language) : prose(body)));
  node.replaceChildren(...parts.filter(Boolean));
}

/** [{code, language, body}] in order. */
export function blocks(text) {
  const found = [];
  let open = null;
  let lines = [];
  const close = () => {
    if (lines.length || open) found.push({ code: open !== null, language: open ?? "", body: lines.join("\n") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = FENCE.exec(line);
    if (fence && open === null) { close(); open = fence[1]; }
    else if (fence && fence[1] === "") { close(); open = null; }
    else lines.push(line);
  }
  close();
  return found;
}

function prose(body) {
  const trimmed = body.replace(/^\n+|\s+$/g, "");
  if (!trimmed) return null;
  const pieces = trimmed.split(/(`[^`\n]+`)/).map((piece, i) => (i % 2 ? el("code", {}, piece.slice(1, -1)) : piece));
  return el("p", { class: "prose" }, ...pieces);
}

function codeBlock(body, language) {
  const head = el("div", { class: "code-head" }, el("span", { class: "mono" }, language), copyButton(() => body));
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", {}, body)));
}

/** A button that copies what `content()` gives, and says so. */
export function copyButton(content) {
  const made = button("copy", () => t("copy"), async () => {
    await copy(content());
    announce(t("copied"));
    made.replaceChildren(icon("done"));
    setTimeout(() => made.replaceChildren(icon("copy")), 1500);
  });
  return made;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });  // over plain http there is no clipboard
  const before = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  before?.focus();
}

/** Changes what is in a scroller and keeps its end in view where it was in view. */
export function following(scroller, change) {
  const near = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  change();
  if (near) scroller.scrollTop = scroller.scrollHeight;
}

/** Calls `paint` with the newest text once a frame at most; `last` is painted at once. */
export function painter(paint) {
  let frame = null;
  let newest = "";
  return {
    next(text) {
      newest = text;
      frame ??= requestAnimationFrame(() => { frame = null; paint(newest); });
    },
    last(text) {
      cancelAnimationFrame(frame);
      paint(text);
    },
  };
}
