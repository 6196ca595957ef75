// Asks one thing at a time, in the browser's own modal dialog: focus stays in it, Escape closes it.

import { el } from "./dom.js";
import { t } from "./words.js";

/** Shows a dialog and waits; `value()` is what it resolves to when its action is taken, null when it is not. */
function open(title, parts, action, kind, value) {
  return new Promise((resolve) => {
    let result = null;
    const submit = (event) => { event.preventDefault(); result = value(); dialog.close(); };
    const cancel = el("button", { type: "button", class: "button", on: { click: () => dialog.close() } }, () => t("dialog.cancel"));
    const heading = el("h2", { id: "dialog-title" }, title);
    const buttons = el("div", { class: "actions" }, cancel, el("button", { class: `button ${kind}` }, action));
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, el("form", { on: { submit } }, heading, ...parts, buttons));
    dialog.addEventListener("close", () => { dialog.remove(); resolve(result); });
    document.body.append(dialog);
    dialog.showModal();
    (dialog.querySelector("input") ?? cancel).focus();
  });
}

/** The server's key, or null where none is given; `why` is what the server said to the last one. */
export function askKey(why) {
  const input = el("input", { type: "password", id: "key", autocomplete: "off", spellcheck: "false", required: true });
  const parts = [
    el("p", {}, () => t("key.text")),
    why === null ? null : el("p", { class: "fault", role: "alert" }, why),
    el("label", { class: "field" }, el("span", {}, () => t("key.label")), input),
  ];
  return open(() => t("key.title"), parts, () => t("key.use"), "primary", () => input.value.trim());
}

/** Whether something that cannot be taken back is really meant; the safe answer has the focus. */
export async function confirm({ title, text, action }) {
  return (await open(title, [el("p", {}, text)], action, "danger", () => true)) === true;
}
