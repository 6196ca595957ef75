// Tables that become cards on a narrow screen (views.css), and the bar that shows a share. The roles are written out
// because a table that is laid out as cards would lose its own.

import { el, svg } from "./dom.js";
import { t } from "./words.js";

/** {node, body} of a table; a column is [key of its words, whether it holds numbers, whether its head is only spoken]. */
export function table(columns, after = null) {
  const heads = columns.map(([key, numeric, spoken = false]) => {
    const words = el("span", { class: spoken ? "unseen" : null }, () => t(key));
    return el("th", { scope: "col", role: "columnheader", class: numeric ? "number" : null }, words);
  });
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads));
  const body = el("tbody", { role: "rowgroup" });
  return { node: el("div", { class: "card table" }, el("table", { role: "table", class: "stacks" }, head, body), after), body };
}

/** A cell; as part of a card it says itself which column it is of. */
export function cell(key, numeric, content = null) {
  const name = key.split(".").at(-1);
  const role = name === "name" ? "rowheader" : "cell";
  return el("td", { role, class: `${numeric ? "number " : ""}cell-${name}`, "data-head": () => t(key) }, content);
}

/** A bar as wide as a share of one; `set` changes it. */
export function bar(share = 0) {
  const filled = svg("rect", { height: "100%", rx: "3" });
  const set = (to) => filled.setAttribute("width", `${(100 * to).toFixed(2)}%`);
  set(share);
  return { node: svg("svg", { class: "share-bar", "aria-hidden": "true" }, filled), set };
}
