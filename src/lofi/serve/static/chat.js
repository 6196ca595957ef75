// A conversation with the base or an adapter, one answer at a time; the answerer may change between turns.

import { stream } from "./answer.js";
import { composer, nothingYet, side } from "./composer.js";
import { announce, button, el } from "./dom.js";
import { facts, nameplate } from "./outcome.js";
import { pick } from "./picker.js";
import { fit, messages, settings } from "./settings.js";
import { copyButton, following, painter, render } from "./text.js";
import { onStatus, seen } from "./watch.js";
import { onSwitch, t } from "./words.js";

const turns = [];
let running = null;

const log = el("ol", { class: "log", "aria-label": () => t("chat.log") });
const empty = nothingYet("chat.empty");
const scroller = el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": () => t("chat.log") }, empty, log);
const answerer = el("span", { class: "answerer" });
const picker = pick({
  kind: "radio", name: "answerer", label: () => t("chat.answerer"), changed: showAnswerer,
  initial: (status) => [(status.adapters[0] ?? { name: status.model }).name],
});
const sideboard = side("chat.answerer", picker.node);
const clear = button("clear", () => t("chat.clear"), reset);
const writer = composer({
  id: "prompt", label: () => t("chat.prompt"), send, stop: () => running?.abort(), extra: [sideboard.opener, answerer, clear],
});

export function chat(view) {
  view.append(el("h2", { class: "unseen" }, () => t("tab.chat")), el("div", { class: "talk" }, scroller, writer.node), sideboard.node);
  view.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  onStatus(({ status }) => { if (status) { fit(status.context); picker.update(status); showAnswerer(); } });
  onSwitch(picker.redraw);
  clear.disabled = true;
  return { shown: sideboard.shown };
}

function showAnswerer() {
  const name = picker.chosen()[0];
  if (answerer.dataset.name === name) return;
  answerer.dataset.name = name;
  answerer.replaceChildren(nameplate(name));
}

/** Whether the prompt was taken; a wrong setting or an answer under way leaves it where it is. */
function send(ask) {
  const values = settings(sideboard.reveal);
  if (running || !seen.status || values === null) return false;
  run({ ask, who: picker.chosen()[0], text: "", answer: null, values });
  return true;
}

function run(turn) {
  turns.push(turn);
  draw(turn);
  empty.hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
  answerTo(turn);
}

/** Earlier turns that came to something; one that failed is shown but not told to the model. */
const told = (turn) => turns.slice(0, turns.indexOf(turn)).filter((one) => one.text).map((one) => [one.ask, one.text]);

async function answerTo(turn) {
  running = new AbortController();
  busy(turn, true);
  const paint = painter((text) => following(scroller, () => render(turn.body, text)));
  turn.answer = await stream({
    model: turn.who, messages: messages(told(turn), turn.ask), settings: turn.values, signal: running.signal, onText: paint.next,
  });
  turn.text = turn.answer.text;
  paint.last(turn.text);
  running = null;
  busy(turn, false);
  finished(turn);
}

function busy(turn, now) {
  turn.article.setAttribute("aria-busy", String(now));
  writer.busy(now);
  clear.disabled = now;
  for (const one of turns) one.again.hidden = now || one !== turns.at(-1);
}

function finished(turn) {
  const { answer } = turn;
  following(scroller, () => {
    turn.facts.replaceChildren(el("span", {}, () => facts(turn)));
    turn.copy.hidden = !turn.text;
    turn.foot.hidden = false;
    turn.fault.textContent = answer.error ?? "";
    turn.fault.hidden = answer.error === null;
  });
  if (answer.error === null) announce(t("chat.done", { name: turn.who, n: answer.usage?.completion_tokens ?? 0 }));
}

function draw(turn) {
  turn.body = el("div", { class: "answer-body" });
  turn.fault = el("p", { class: "fault", role: "alert", hidden: true });
  turn.facts = el("span", { class: "facts quiet small" });
  turn.copy = copyButton(() => turn.text);
  turn.again = button("again", () => t("chat.again"), () => again(turn));
  turn.foot = el("footer", { class: "answer-foot", hidden: true }, turn.facts, turn.copy, turn.again);
  turn.article = el("article", { class: "answer" }, nameplate(turn.who), turn.body, turn.fault, turn.foot);
  turn.node = el("li", { class: "turn" }, el("div", { class: "ask" }, el("p", { class: "prose" }, turn.ask)), turn.article);
  log.append(turn.node);
}

/** Answers the last prompt once more, by whoever is chosen now and with the settings as they are now. */
function again(turn) {
  const values = settings(sideboard.reveal);
  if (running || values === null) return;
  turns.pop();
  turn.node.remove();
  run({ ask: turn.ask, who: picker.chosen()[0], text: "", answer: null, values });
  writer.input.focus();
}

function reset() {
  turns.length = 0;
  log.replaceChildren();
  empty.hidden = false;
  clear.disabled = true;
  writer.input.focus();
}
