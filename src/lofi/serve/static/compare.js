// One prompt, several answerers: a column each, streaming at the same time; words that a chosen one does not have are marked.

import { stream } from "./answer.js";
import { composer, nothingYet, side } from "./composer.js";
import { difference } from "./difference.js";
import { announce, el } from "./dom.js";
import { facts, finish, nameplate } from "./outcome.js";
import { pick } from "./picker.js";
import { messages, settings } from "./settings.js";
import { copyButton, following, painter } from "./text.js";
import { onStatus, seen } from "./watch.js";
import { onSwitch, percent, t } from "./words.js";

let columns = [];
let running = null;

const asked = el("p", { class: "asked prose", hidden: true });
const board = el("div", { class: "columns", tabindex: "0", role: "region", "aria-label": () => t("compare.columns"), hidden: true });
const empty = nothingYet("compare.empty");
const fault = el("p", { class: "fault", role: "alert", hidden: true }, () => t("compare.none"));
const marking = el("select", { id: "reference", on: { change: mark } }, el("option", { value: "" }, () => t("compare.mark.none")));
const picker = pick({
  kind: "checkbox", name: "compared", label: () => t("compare.who"), changed: () => { fault.hidden = true; },
  initial: (status) => [status.model, ...status.adapters.slice(0, 3).map((item) => item.name)],
});
const sideboard = side("compare.who", picker.node);
const writer = composer({
  id: "compare-prompt", label: () => t("compare.prompt"), send, stop: () => running?.abort(),
  extra: [sideboard.opener, el("label", { class: "check marking" }, () => t("compare.mark"), marking)],
});

export function compare(view) {
  view.append(
    el("h2", { class: "unseen" }, () => t("tab.compare")),
    el("div", { class: "talk wide" }, el("div", { class: "stage" }, empty, asked, board), fault, writer.node), sideboard.node,
  );
  view.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  onStatus(({ status }) => { if (status) picker.update(status); });
  onSwitch(picker.redraw);
  return { shown: sideboard.shown };
}

function send(ask) {
  const values = settings(sideboard.reveal);
  if (running || !seen.status || values === null) return false;
  const names = picker.chosen();
  fault.hidden = names.length > 0;
  if (!names.length) return false;
  start(ask, names, values);
  return true;
}

async function start(ask, names, values) {
  running = new AbortController();
  const { signal } = running;
  columns = names.map(column);
  offer(names);
  asked.textContent = ask;
  board.replaceChildren(...columns.map((one) => one.node));
  board.scrollLeft = 0;
  for (const node of [asked, board]) node.hidden = false;
  empty.hidden = true;
  writer.busy(true);
  await Promise.all(columns.map((one) => answerTo(one, { model: one.name, messages: messages([], ask), settings: values, signal })));
  running = null;
  writer.busy(false);
  mark();
  announce(t("compare.done", { n: columns.length }));
}

function column(name) {
  const made = { name, answer: null, body: el("div", { class: "column-body prose" }), differs: el("p", { class: "differs small" }) };
  made.state = el("span", { class: "state small" }, () => t("compare.waiting"));
  made.fault = el("p", { class: "fault", role: "alert", hidden: true });
  made.facts = el("p", { class: "facts quiet small" });
  made.foot = el("footer", { hidden: true }, made.facts, made.differs);
  made.copy = copyButton(() => made.answer?.text ?? "");
  made.node = el(
    "section", { class: "column", "data-name": name, "aria-busy": "true", "aria-label": name },
    el("header", {}, nameplate(name, "h3"), made.state, made.copy), made.body, made.fault, made.foot,
  );
  return made;
}

function state(one, say) {
  const fresh = el("span", { class: "state small" }, say);
  one.state.replaceWith(fresh);
  one.state = fresh;
}

async function answerTo(one, request) {
  let started = false;
  const paint = painter((text) => following(one.body, () => { one.body.textContent = text; }));
  const onText = (text) => {
    if (!started) { started = true; state(one, () => t("compare.streaming")); }
    paint.next(text);
  };
  one.answer = await stream({ ...request, onText });
  paint.last(one.answer.text);
  one.node.setAttribute("aria-busy", "false");
  state(one, () => finish(one.answer.finish));
  one.facts.replaceChildren(el("span", {}, () => facts({ answer: { ...one.answer, finish: "stop" } })));
  one.foot.hidden = one.answer.firstMs === null;
  one.fault.hidden = one.answer.error === null;
  one.fault.textContent = one.answer.error ?? "";
}

/** Whom answers may be marked against; the choice stays as long as it can. */
function offer(names) {
  const before = marking.value;
  const first = marking.options.length === 1;
  marking.replaceChildren(marking.options[0], ...names.map((name) => el("option", { value: name }, name)));
  marking.value = names.includes(before) ? before : first || before ? names[0] : "";
}

/** Marks the words of each answer that the reference does not have, and says how many they are. */
function mark() {
  if (running || !columns.length) return;
  const reference = columns.find((one) => one.name === marking.value);
  for (const one of columns) {
    const comparable = reference && one !== reference && !one.answer.error && !reference.answer.error;
    const found = comparable ? difference(reference.answer.text, one.answer.text) : null;
    if (found === null) one.body.textContent = one.answer.text;
    else one.body.replaceChildren(...joined(found.pieces).map(([text, fresh]) => (fresh ? el("mark", {}, text) : text)));
    one.differs.replaceChildren(...(found === null ? [] : [el("span", {}, () => summary(one, reference, found))]));
  }
}

function summary(one, reference, { count, total }) {
  if (one.answer.text === reference.answer.text) return t("compare.same", { name: reference.name });
  return t("compare.differs", { n: count, total, share: percent(total ? count / total : 0), name: reference.name });
}

/** Neighbours that are both new, with the space between them, become one piece. */
function joined(pieces) {
  const made = [];
  pieces.forEach(([text, fresh], i) => {
    const between = !fresh && !text.trim() && pieces[i - 1]?.[1] && pieces[i + 1]?.[1] && !text.includes("\n");
    const now = fresh || between;
    if (made.length && made.at(-1)[1] === now) made.at(-1)[0] += text;
    else made.push([text, now]);
  });
  return made;
}
