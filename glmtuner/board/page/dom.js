"use strict";
// Elements are made of texts and never of markup, so that no name, answer or configuration can become a part of the page.
const board = { views: {}, words: {} };

// board.h("p", { class: "faint", onclick: f, "aria-label": text }, "text", element, [more], null)
board.h = (name, attributes, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (["value", "checked", "selected", "disabled", "hidden", "open", "indeterminate"].includes(key)) element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

board.fill = (element, ...children) => {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

// a setting that this browser remembers
board.setting = (name, fallback) => {
  try {
    const stored = localStorage.getItem(`glmtuner-board-${name}`);
    return stored === null ? fallback : JSON.parse(stored);
  } catch {
    return fallback;
  }
};
board.remember = (name, value) => {
  try {
    localStorage.setItem(`glmtuner-board-${name}`, JSON.stringify(value));
  } catch {
    // private windows may store nothing
  }
};
