// Makes nodes. A property or child that is a function is bound to the language (words.js). No string becomes markup.

import { bind } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

/** el("button", {class: "x", "aria-label": say, on: {click}}, "text", say, node, null), where say() gives the words. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) set(node, name, value);
  if (children.length === 1 && typeof children[0] === "function") bind(node, "text", children[0]);
  else append(node, children);
  return node;
}

function set(node, name, value) {
  if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
  else if (typeof value === "function") bind(node, name, value);
  else if (value === true) node.setAttribute(name, "");
  else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
}

function append(node, children) {
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(typeof child === "function" ? el("span", {}, child) : child);
  }
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const PATHS = {
  send: "M12 19V5M5.5 11.5 12 5l6.5 6.5",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  done: "m5 12.5 4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4.5h-4.5",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M13 8a2 2 0 1 0 4 0 2 2 0 1 0-4 0M7 16a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  close: "m6 6 12 12M18 6 6 18",
  clear: "M5 7h14M10 7V4.5h4V7M7 7l1 12.5h8L17 7",
  auto: ["M12 4a8 8 0 1 0 0 16 8 8 0 1 0 0-16", "M12 4a8 8 0 0 1 0 16z"],
  light: ["M12 8a4 4 0 1 0 0 8 4 4 0 1 0 0-8", "M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2",
    "M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4"],
  dark: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10",
};

export function icon(name) {
  const paths = [PATHS[name]].flat().map((d) => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 24 24", class: `icon icon-${name}`, "aria-hidden": "true" }, ...paths);
}

/** A button with an icon; its words are shown beside it, or only spoken and shown on hover where `quiet`. */
export function button(name, say, click, { quiet = true, kind = "" } = {}) {
  const words = quiet ? { "aria-label": say, title: say } : {};
  return el(
    "button", { type: "button", class: `${quiet ? "icon-button" : "button"} ${kind}`, ...words, on: { click } },
    icon(name), quiet ? null : say,
  );
}

/** Says something once to those who listen rather than look. */
export function announce(text) {
  document.getElementById("said").textContent = text;
}
