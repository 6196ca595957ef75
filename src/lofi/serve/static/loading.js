// Loading and unloading with the admin token, which stays in this module's input unless it is asked to outlive a reload.

import { call } from "./api.js";
import { confirm } from "./dialog.js";
import { announce, el } from "./dom.js";
import { rank } from "./picker.js";
import { look, seen } from "./watch.js";
import { bind, bytes, t } from "./words.js";

const STORED = "lofi.admin";
const TEXT = { required: true, autocomplete: "off", spellcheck: "false", autocapitalize: "off" };

const name = el("input", { id: "load-name", ...TEXT });
const folder = el("input", { id: "load-folder", class: "mono", ...TEXT });
const token = el("input", { id: "admin-token", type: "password", ...TEXT });
const keep = el("input", { type: "checkbox", id: "keep-token" });
const load = el("button", { class: "button primary" }, () => t("admin.load"));

/** What came of the last change, beside the form. */
export const message = el("p", { class: "message", hidden: true });

export const form = el(
  "form", { class: "card load", "aria-labelledby": "load-title", on: { submit } },
  el("h3", { id: "load-title" }, () => t("admin.title")), el("p", { class: "quiet small" }, () => t("admin.text")),
  el("div", { class: "load-fields" }, field("admin.name", name), field("admin.folder", folder), field("admin.token", token)),
  el("div", { class: "load-end" }, el("label", { class: "check" }, keep, () => t("admin.keep")), load),
);

token.value = session("getItem") ?? "";
keep.checked = token.value !== "";
for (const one of [keep, token]) one.addEventListener("change", store);

function field(key, input) {
  return el("div", { class: "field" }, el("label", { for: input.id }, () => t(key)), input);
}

function store() {
  if (keep.checked && token.value) session("setItem", token.value);
  else session("removeItem");
}

function session(verb, value) {
  try { return sessionStorage[verb](STORED, value); } catch { return null; }  // it may be switched off
}

async function submit(event) {
  event.preventDefault();
  const asked = { lora_name: name.value.trim(), lora_path: folder.value.trim() };
  if (!(await act(load, "/v1/load_lora_adapter", asked, "admin.loading"))) return;
  const item = seen.status?.adapters.find((one) => one.name === asked.lora_name);
  if (item) say("fine", () => t("admin.loaded.as", { name: item.name, rank: rank(item), size: bytes(item.bytes) }));
  else say("fine", () => t("admin.loaded", { name: asked.lora_name }));
  name.value = folder.value = "";
  name.focus();
}

/** Unloads an adapter after asking whether that is meant; `control` is the button that it was asked with. */
export async function unload(which, control) {
  if (!token.value) {
    say("fault", () => t("admin.token.first"));
    token.focus();
    return;
  }
  const title = () => t("unload.title", { name: which });
  if (!(await confirm({ title, text: () => t("unload.text"), action: () => t("adapters.unload") }))) return;
  if (!(await act(control, "/v1/unload_lora_adapter", { lora_name: which }, "admin.unloading"))) return;
  say("fine", () => t("admin.unloaded", { name: which }));
  name.focus();  // the button is gone
}

/** Whether the server did it; its reason is shown where it did not. */
async function act(control, path, asked, doing) {
  control.disabled = true;
  say("busy", () => t(doing, { name: asked.lora_name }));
  try {
    await call(path, { method: "POST", body: asked, bearer: token.value });
    await look();
    return true;
  } catch (error) {
    say("fault", () => error.message);
    return false;
  } finally {
    control.disabled = false;
  }
}

function say(kind, words) {
  message.hidden = false;
  message.dataset.kind = kind;
  message.setAttribute("role", kind === "fault" ? "alert" : "note");
  bind(message, "text", words);
  if (kind !== "fault") announce(words());
}
