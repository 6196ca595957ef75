// The fields that shape an answer, shared by chat and side by side: one set, moved to whichever view is shown.

import { el } from "./dom.js";
import { number, t } from "./words.js";

const FIELDS = [  // name in the API, lowest, highest, step, start
  ["temperature", 0, 2, "any", 0],
  ["top_p", 0.01, 1, "any", 1],
  ["max_tokens", 1, 1_000_000, 1, 256],
  ["seed", 0, 4_294_967_295, 1, null],
];

const system = el("textarea", { id: "system", rows: "3", placeholder: () => t("settings.system.none") });
const inputs = new Map();

function field([name, low, high, step, start]) {
  const id = `setting-${name}`;
  const integer = step === 1;
  const input = el("input", {
    id, type: "number", min: low, max: high, step, inputmode: integer ? "numeric" : "decimal", value: start,
    required: start !== null, placeholder: start === null ? () => t("settings.random") : null, "aria-describedby": `${id}-fault`,
  });
  const fault = el("span", { id: `${id}-fault`, class: "fault small", hidden: true }, () =>
    t(integer ? "settings.integer" : "settings.range", { low: number(low, low % 1 ? 2 : 0), high: number(high) }));
  input.addEventListener("input", () => check(name));
  inputs.set(name, { input, fault });
  return el("div", { class: "field" }, el("label", { for: id }, () => t(`settings.${name}`)), input, fault);
}

function check(name) {
  const { input, fault } = inputs.get(name);
  fault.hidden = input.validity.valid;
  input.toggleAttribute("aria-invalid", !input.validity.valid);
  return input.validity.valid;
}

export const panel = el(
  "div", { class: "settings", role: "group", "aria-label": () => t("settings") },
  el("div", { class: "field" }, el("label", { for: "system" }, () => t("settings.system")), system),
  el("div", { class: "pair" }, ...FIELDS.map(field)),
  el("p", { class: "quiet small" }, () => t("settings.greedy")),
);

/** Leaves half of a short context to the prompt, before anybody has chosen otherwise. */
export function fit(context) {
  const { input } = inputs.get("max_tokens");
  if (input.value === input.defaultValue && input.valueAsNumber > context / 2) input.value = Math.max(1, Math.floor(context / 2));
}

/** What goes into the request, or null after showing which field is wrong; `reveal` makes the fields visible. */
export function settings(reveal) {
  const wrong = [...inputs.keys()].filter((name) => !check(name));
  if (wrong.length) {
    reveal();
    inputs.get(wrong[0]).input.focus();
    return null;
  }
  const given = [...inputs].filter(([, { input }]) => input.value !== "");
  return Object.fromEntries(given.map(([name, { input }]) => [name, input.valueAsNumber]));
}

/** The messages of a conversation: the system prompt where there is one, then [user, assistant] pairs, then the ask. */
export function messages(pairs, ask) {
  const made = system.value.trim() ? [{ role: "system", content: system.value }] : [];
  for (const [user, assistant] of pairs) {
    made.push({ role: "user", content: user }, { role: "assistant", content: assistant });
  }
  return [...made, { role: "user", content: ask }];
}
