// Throughput and latency as they are: four curves over two minutes, the engine's counts, the last requests.

import { el, svg } from "./dom.js";
import { finish, nameplate } from "./outcome.js";
import { spark, WINDOW } from "./spark.js";
import { look, onStatus, seen } from "./watch.js";
import { duration, figure, milliseconds, number, onSwitch, percent, t } from "./words.js";

const MOST = 50;
const points = [];  // what was seen in the last two minutes, oldest first
const milli = (value) => (value === null ? "–" : milliseconds(value));
const quantile = (name, q) => ({ latency }) => latency[name]?.[q] ?? null;

const TILES = [  // key, how a value is written, the lines: [name of the line, where the value is]
  ["rate", (value) => figure(value), [["rate.now", (status) => status.engine.tokens_per_second]]],
  ["rows", (value) => number(value), [["rows.running", (status) => status.engine.running], ["rows.waiting", (status) => status.engine.waiting]]],
  ["first", milli, [["p50", quantile("first_token_ms", "p50")], ["p95", quantile("first_token_ms", "p95")]]],
  ["token", milli, [["p50", quantile("token_ms", "p50")], ["p95", quantile("token_ms", "p95")]]],
];
const COLUMNS = ["adapter", "prompt", "tokens", "seconds", "first", "speed", "finish"];

const tiles = TILES.map(tile);
const counts = el("dl", { class: "counts" });
const body = el("tbody", { role: "rowgroup" });
const nothing = el("p", { class: "empty-line quiet" }, () => t("live.requests.none"));

export function live(view) {
  const heads = COLUMNS.map((name, i) => el("th", { scope: "col", role: "columnheader", class: i && name !== "finish" ? "number" : "" }, () => t(`request.${name}`)));
  view.append(
    el("header", { class: "page-head" }, el("div", {}, el("h2", {}, () => t("tab.live")), el("p", { class: "quiet" }, () => t("live.text")))),
    el("div", { class: "tiles" }, ...tiles.map((one) => one.node)),
    el("div", { class: "card" }, counts),
    el("h3", {}, () => t("live.requests")),
    el("div", { class: "card table" }, el("table", { role: "table", class: "stacks" }, el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)), body), nothing),
  );
  onStatus(({ status, error }) => { if (status && !error) { note(status); if (!view.hidden) draw(); } });
  onSwitch(draw);
  return { shown() { draw(); look(); } };
}

function note(status) {
  const now = performance.now() / 1000;
  points.push({ time: now, values: tiles.map((one) => one.read(status)) });
  while (points.length && points[0].time < now - WINDOW) points.shift();
}

function tile([key, write, lines]) {
  const values = lines.map(([name]) => ({ name, number: el("strong", { class: "tile-value" }, "–") }));
  const several = lines.length > 1;
  const drawing = spark({
    lines: lines.map((_, i) => `line-${i}`), top: (most) => (most ? t("live.top", { value: write(most) }) : ""),
    say: () => `${t(`live.${key}`)}: ${values.map((one) => `${t(`live.${one.name}`)} ${one.number.textContent}`).join(", ")}`,
  });
  const legend = values.map(({ name, number: shown }, i) =>
    el("span", { class: `tile-line line-${i}` }, shown, el("span", { class: several ? "tile-name" : "tile-name plain" }, () => t(`live.${name}`))));
  return {
    node: el("section", { class: "card tile", "data-tile": key }, el("h3", {}, () => t(`live.${key}`)), el("div", { class: "tile-values" }, ...legend), drawing.node),
    read: (status) => lines.map(([, read]) => read(status)),
    draw(history, now) {
      const newest = history.at(-1)?.[1];
      values.forEach((one, i) => { one.number.textContent = newest ? write(newest[i] ?? null) : "–"; });
      drawing.update(history.map(([time, of]) => [time, ...of]), now);
    },
  };
}

function draw() {
  const { status } = seen;
  if (!status) return;
  const now = points.at(-1)?.time ?? 0;
  tiles.forEach((one, i) => one.draw(points.map((point) => [point.time, point.values[i]]), now));
  counts.replaceChildren(...counted(status).flatMap(([key, text, share]) => count(key, text, share)));
  const last = status.requests.slice(0, MOST);  // the newest first
  nothing.hidden = last.length > 0;
  body.replaceChildren(...last.map(row));
}

function counted({ engine, uptime, context }) {
  const ends = Object.entries(engine.finished).filter(([, n]) => n).map(([reason, n]) => `${finish(reason)} ${number(n)}`);
  const used = engine.cache_capacity ? engine.cache_tokens / engine.cache_capacity : 0;
  return [
    ["uptime", duration(uptime)], ["context", t("tokens", { n: context })], ["prompt", number(engine.prompt_tokens)],
    ["generated", number(engine.generated_tokens)], ["steps", number(engine.steps)],
    ["cache", `${percent(used)} (${number(engine.cache_tokens)} / ${number(engine.cache_capacity)})`, used],
    ["finished", ends.join(" · ") || "–"],
  ];
}

function count(key, text, share) {
  const bar = share === undefined ? null : svg("svg", { class: "share-bar", "aria-hidden": "true" }, svg("rect", { height: "100%", width: `${(100 * share).toFixed(2)}%`, rx: "3" }));
  return el("div", { class: `count count-${key}` }, el("dt", { class: "quiet small" }, t(`count.${key}`)), el("dd", {}, text, bar));
}

function row(request) {
  const speed = request.tokens > 1 && request.seconds > (request.first_token_ms ?? 0) / 1000
    ? (request.tokens - 1) / (request.seconds - (request.first_token_ms ?? 0) / 1000) : null;
  const cells = [
    nameplate(request.adapter ?? seen.status.model), number(request.prompt_tokens), number(request.tokens), `${number(request.seconds, 2)} s`,
    milli(request.first_token_ms), speed === null ? "–" : t("fact.rate", { n: figure(speed) }), finish(request.finish),
  ];
  return el("tr", { role: "row" }, ...cells.map((cell, i) =>
    el("td", { role: "cell", class: `${i && i < 6 ? "number" : ""} cell-${COLUMNS[i]}`, "data-head": t(`request.${COLUMNS[i]}`) }, cell)));
}
