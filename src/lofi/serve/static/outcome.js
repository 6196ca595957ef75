// What is shown beside an answer: who gives it, how it ended, what it cost. Shared by chat and side by side.

import { el } from "./dom.js";
import { hue, rank } from "./picker.js";
import { seen } from "./watch.js";
import { figure, knows, milliseconds, t } from "./words.js";

/** The coloured name of the base or an adapter, with its rank. */
export function nameplate(name, tag = "span") {
  const { model, adapters } = seen.status;
  const item = adapters.find((one) => one.name === name);
  const about = name === model ? () => t("pick.base") : item && (() => rank(item));
  return el(
    tag, { class: `nameplate ${hue(name, model)}` },
    el("span", { class: "dot", "aria-hidden": "true" }), el("span", { class: "mono" }, name),
    about && el("span", { class: "quiet small" }, about),
  );
}

/** One line: first token, speed, tokens, and the end where it is not the usual one. */
export function facts({ answer }) {
  const parts = [];
  if (answer.finish !== "stop" && answer.finish !== "error") parts.push(finish(answer.finish));
  if (answer.firstMs !== null) parts.push(t("fact.first", { ms: milliseconds(answer.firstMs) }));
  if (answer.rate !== null) parts.push(t("fact.rate", { n: figure(answer.rate) }));
  if (answer.usage) parts.push(t("fact.tokens", { prompt: answer.usage.prompt_tokens, n: answer.usage.completion_tokens }));
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");  // a line breaks between facts, not within one
}

/** How an answer ended, in words; a reason that is not known is shown as the server wrote it. */
export const finish = (reason) => (knows(`finish.${reason}`) ? t(`finish.${reason}`) : String(reason));
