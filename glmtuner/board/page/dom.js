"use strict";
// Elements are made of texts and never of markup, so that no name, answer or configuration can become a part of the page.
const board = { views: {}, words: {} };

// Characters that are not seen or that turn what is around them: names and answers show them as \u202e. Line breaks
// and tabs remain.
const unseen =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
const escaped = (character) => {
  const code = character.codePointAt(0);
  return code > 0xffff ? `\\u{${code.toString(16)}}` : `\\u${code.toString(16).padStart(4, "0")}`;
};
board.visible = (text) => String(text).replace(unseen, escaped);
// the same for whatever is put into an element, and for what is read out in its place
board.parts = (children) =>
  children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : board.visible(child)));
const read = ["title", "alt", "placeholder", "label"];
board.attribute = (key, value) => (read.includes(key) || key.startsWith("aria-") ? board.visible(value) : value);

// board.h("p", { class: "faint", onclick: f, "aria-label": text }, "text", element, [more], null)
board.h = (name, attributes, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (["value", "checked", "selected", "disabled", "hidden", "open", "indeterminate"].includes(key)) element[key] = value;
    else element.setAttribute(key, value === true ? "" : board.attribute(key, value));
  }
  element.append(...board.parts(children));
  return element;
};

board.fill = (element, ...children) => {
  element.replaceChildren(...board.parts(children));
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
