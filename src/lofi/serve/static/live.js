// Throughput and latency as they are: four curves over two minutes, the engine's counts, the last requests.

import { el } from "./dom.js";
import { finish, nameplate } from "./outcome.js";
import { spark, WINDOW } from "./spark.js";
import { bar, cell, table } from "./table.js";
import { onStatus, seen } from "./watch.js";
import { duration, figure, language, milliseconds, number, onSwitch, percent, t } from "./words.js";

const MOST = 50;
const points = [];  // what was seen in the last two minutes, oldest first
const milli = (value) => (value === null ? "–" : milliseconds(value));
const engine = (name) => ({ engine: of }) => of[name];
const quantile = (name, q) => ({ latency }) => latency[name][q];

const TILES = [  // key, how a value is written, the lines: [name of the line, where the value is]
  ["rate", figure, [["rate.now", engine("tokens_per_second")]]],
  ["rows", number, [["rows.running", engine("running")], ["rows.waiting", engine("waiting")]]],
  ["first", milli, [["p50", quantile("first_token_ms", "p50")], ["p95", quantile("first_token_ms", "p95")]]],
  ["token", milli, [["p50", quantile("token_ms", "p50")], ["p95", quantile("token_ms", "p95")]]],
];
const NAMES = ["adapter", "prompt", "tokens", "seconds", "first", "speed", "finish"];
const COLUMNS = NAMES.map((name) => [`request.${name}`, name !== "adapter" && name !== "finish"]);

const tiles = TILES.map(tile);
const counts = el("dl", { class: "counts" });
const nothing = el("p", { class: "empty-line quiet" }, () => t("live.requests.none"));
const { node: list, body } = table(COLUMNS, nothing);
let drawn = null;

export function live(view) {
  const title = el("div", {}, el("h2", {}, () => t("tab.live")), el("p", { class: "quiet" }, () => t("live.text")));
  view.append(
    el("header", { class: "page-head" }, title), el("div", { class: "tiles" }, ...tiles.map((one) => one.node)),
    el("div", { class: "card" }, counts), el("h3", {}, () => t("live.requests")), list,
  );
  onStatus(({ status, error }) => {
    if (!status || error) return;
    note(status);
    if (!view.hidden) draw();
  });
  onSwitch(draw);
  return { shown: draw };
}

function note(status) {
  const now = performance.now() / 1000;
  points.push({ time: now, values: tiles.map((one) => one.read(status)) });
  while (points.length && points[0].time < now - WINDOW) points.shift();
}

function tile([key, write, lines]) {
  const values = lines.map(([name]) => ({ name, number: el("strong", { class: "tile-value" }, "–") }));
  const plain = lines.length > 1 ? "" : " plain";
  const said = () => values.map((one) => `${t(`live.${one.name}`)} ${one.number.textContent}`).join(", ");
  const drawing = spark({
    lines: lines.map((_, i) => `line-${i}`), say: () => `${t(`live.${key}`)}: ${said()}`,
    top: (most) => (most ? t("live.top", { value: write(most) }) : ""),
  });
  const legend = values.map(({ name, number: shown }, i) =>
    el("span", { class: `tile-line line-${i}` }, shown, el("span", { class: `tile-name${plain}` }, () => t(`live.${name}`))));
  const title = el("h3", {}, () => t(`live.${key}`));
  return {
    node: el("section", { class: "card tile", "data-tile": key }, title, el("div", { class: "tile-values" }, ...legend), drawing.node),
    read: (status) => lines.map(([, read]) => read(status)),
    draw(history, now) {
      const newest = history.at(-1)?.[1];
      values.forEach((one, i) => { one.number.textContent = newest ? write(newest[i]) : "–"; });
      drawing.update(history.map(([time, of]) => [time, ...of]), now);
    },
  };
}

function draw() {
  const { status } = seen;
  if (!status) return;
  const now = points.at(-1)?.time ?? 0;
  tiles.forEach((one, i) => one.draw(points.map((point) => [point.time, point.values[i]]), now));
  counts.replaceChildren(...counted(status).map(count));
  const last = status.requests.slice(0, MOST);  // the newest first
  nothing.hidden = last.length > 0;
  const current = JSON.stringify([language(), last]);
  if (current !== drawn) body.replaceChildren(...last.map(row));  // else a selection in it stays
  drawn = current;
}

/** [key, words, share that a bar shows] */
function counted({ engine: of, uptime, context }) {
  const ends = Object.entries(of.finished).filter(([, n]) => n).map(([reason, n]) => `${finish(reason)} ${number(n)}`);
  const used = of.cache_capacity ? of.cache_tokens / of.cache_capacity : 0;
  return [
    ["uptime", duration(uptime)], ["context", t("tokens", { n: context })], ["prompt", number(of.prompt_tokens)],
    ["generated", number(of.generated_tokens)], ["steps", number(of.steps)],
    ["cache", `${percent(used)} (${number(of.cache_tokens)} / ${number(of.cache_capacity)})`, used],
    ["finished", ends.join(" · ") || "–"],
  ];
}

function count([key, words, share]) {
  const shown = share === undefined ? null : bar(share).node;
  return el("div", { class: `count count-${key}` }, el("dt", { class: "quiet small" }, t(`count.${key}`)), el("dd", {}, words, shown));
}

function row(request) {
  const decoding = request.seconds - (request.first_token_ms ?? 0) / 1000;
  const speed = request.tokens > 1 && decoding > 0 ? t("fact.rate", { n: figure((request.tokens - 1) / decoding) }) : "–";
  const contents = [
    nameplate(request.adapter ?? seen.status.model), number(request.prompt_tokens), number(request.tokens),
    `${number(request.seconds, 2)} s`, milli(request.first_token_ms), speed, finish(request.finish),
  ];
  return el("tr", { role: "row" }, ...contents.map((content, i) => cell(...COLUMNS[i], content)));
}
