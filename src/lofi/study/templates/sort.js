"use strict";
for (const table of document.querySelectorAll("table.arms")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, place) => { const found = row.cells[place].dataset.sort; return found === "" ? null : found; };
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  const sort = (place) => {
    const head = heads[place], now = head.getAttribute("aria-sort");
    const way = now === "none" ? head.dataset.first : now === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.setAttribute("aria-sort", other === head ? way : "none");
    const known = [...body.rows].filter((row) => value(row, place) !== null);
    const unknown = [...body.rows].filter((row) => value(row, place) === null);
    known.sort((a, b) => (way === "ascending" ? 1 : -1) * compare(value(a, place), value(b, place)));
    body.append(...known, ...unknown);
  };
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(place));
    head.append(button);
    if (!head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
  });
}
