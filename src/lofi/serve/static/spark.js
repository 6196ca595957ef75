// A small curve over the last two minutes: one or two lines against time, drawn as SVG. Knows no unit and no words.

import { el, svg } from "./dom.js";

export const WINDOW = 120;  // seconds
const WIDTH = 240;
const HEIGHT = 64;

/** `say` describes the curve to those who do not see it; update([[time, ...values]], now) draws it. */
export function spark({ lines, say, top }) {
  const grid = svg("path", { class: "spark-grid", d: `M0 4H${WIDTH}M0 ${HEIGHT / 2 + 1}H${WIDTH}` });
  const area = svg("path", { class: "spark-area" });
  const paths = lines.map((name) => svg("path", { class: `spark-line ${name}` }));
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
  const drawing = svg("svg", { class: "spark", role: "img", ...box }, grid, area, ...paths);
  const highest = el("span", { class: "spark-top quiet", "aria-hidden": "true" });
  return {
    node: el("div", { class: "spark-frame" }, drawing, highest),
    update(points, now) {
      const most = Math.max(0, ...points.flatMap(([, ...values]) => values.filter((value) => value !== null)));
      const place = (time, value) => [
        ((WIDTH * (time - now + WINDOW)) / WINDOW).toFixed(1), (HEIGHT - 2 - ((HEIGHT - 6) * value) / (most || 1)).toFixed(1),
      ];
      const places = (i) => points.filter((point) => point[i] !== null).map((point) => place(point[0], point[i]));
      paths.forEach((path, i) => path.setAttribute("d", line(places(i + 1))));
      area.setAttribute("d", filled(places(1)));
      drawing.setAttribute("aria-label", say());
      highest.textContent = top(most);
    },
  };
}

const line = (places) => (places.length ? `M${places.map((place) => place.join(" ")).join("L")}` : "");

const filled = (places) => (places.length > 1 ? `${line(places)}L${places.at(-1)[0]} ${HEIGHT}L${places[0][0]} ${HEIGHT}Z` : "");
