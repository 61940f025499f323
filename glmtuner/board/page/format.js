"use strict";
{
  // How texts, numbers and times are shown.

  // A text as it is shown, on one line, for names and cells
  board.line = (text) => board.visible(text).replace(/[\t\n]+/g, " ");

  // 12.07, 0.0003, 1.2e-7: at most `digits` significant ones
  board.number = (value, digits = 4) => {
    if (value === null || value === undefined) return "";
    if (typeof value !== "number") return board.line(value);
    if (!Number.isFinite(value)) return String(value);
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
    const size = Math.abs(value);
    if (size >= 1e-4 && size < 1e7) {
      const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
      return size >= 1e3 ? Math.round(value).toLocaleString("en-US") : value.toFixed(Math.min(decimals, 8));
    }
    return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  };
  // a value with its interval, all with the decimals of the value
  board.score = (value, interval) => {
    if (!interval || typeof value !== "number" || !interval.every(Number.isFinite)) return board.number(value);
    const decimals = (board.number(value).split(".")[1] || "").length;
    const isPlain = Math.abs(value) < 1e3 && !board.number(value).includes("e");
    const [low, high] = interval.map((bound) => (isPlain ? bound.toFixed(decimals) : board.number(bound)));
    return `${board.number(value)} [${low}, ${high}]`;
  };
  // a number without the zeros at its end, for the ticks of axes
  board.tick = (value) =>
    Math.abs(value) >= 10000
      ? board.compact(value)
      : board
          .number(value, 3)
          .replace(/(\.\d*?)0+$/, "$1")
          .replace(/\.$/, "");
  board.compact = (value) =>
    new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 2 }).format(value);
  // the value of a metric with its unit, and its interval where there is one
  board.measured = (name, value, interval) => {
    if (typeof value === "number" && /runtime/.test(name))
      return value < 60 ? `${board.number(value, 3)} s` : board.duration(value);
    if (typeof value === "number" && /memory_gib/.test(name)) return `${board.number(value, 3)} GiB`;
    return board.score(value, interval);
  };
  // what a configuration holds, as one would type it
  board.value = (value) =>
    value === null || value === undefined ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value);
  board.short = (text, length = 80) => {
    const characters = [...board.line(text)];
    return characters.length > length ? `${characters.slice(0, length - 1).join("")}…` : characters.join("");
  };

  board.duration = (seconds) => {
    if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "";
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return board.word("seconds", { n: whole });
    if (whole < 3600)
      return board.word("minutes", { n: Math.floor(whole / 60), s: String(whole % 60).padStart(2, "0") });
    if (whole < 172800)
      return board.word("hours", {
        n: Math.floor(whole / 3600),
        m: String(Math.floor((whole % 3600) / 60)).padStart(2, "0"),
      });
    return board.word("days", { n: Math.floor(whole / 86400) });
  };
  board.date = (seconds) =>
    seconds ? new Date(seconds * 1000).toLocaleString(document.documentElement.lang, { hour12: false }) : "";
  board.bytes = (count) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
    return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
  };
  // words that may come from a newer board: a state that has no word here is shown as it is
  board.maybe = (prefix, name) => board.words[board.language][`${prefix}.${name}`] || board.line(name);

  // The shortest name of a key among others: trainer.learning_rate -> learning_rate unless another ends so.
  board.shorten = (keys) => {
    const names = new Map();
    for (const key of keys) {
      const parts = key.split(".");
      let count = 1;
      const isShared = () =>
        keys.some((other) => other !== key && `.${other}`.endsWith(`.${parts.slice(-count).join(".")}`));
      while (count < parts.length && isShared()) count += 1;
      names.set(key, parts.slice(-count).join("."));
    }
    return names;
  };

  board.svg = (name, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, board.attribute(key, value));
    }
    element.append(...board.parts(children));
    return element;
  };

  board.download = (name, type, content) => {
    const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
    board.h("a", { href: address, download: name.replace(/[^\p{L}\p{N}._-]+/gu, "_") }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  };
  // A spreadsheet takes a cell that begins with one of =+-@ for a formula; a quote before it makes it a text.
  // Numbers stay numbers.
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    const safe = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  board.csv = (rows) => `${rows.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;

  board.copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      board.notice(board.word("copied"));
    } catch {
      board.notice(board.word("notCopied"), true);
    }
  };
  board.copyButton = (text) =>
    board.h("button", { type: "button", class: "small", onclick: () => board.copy(text()) }, board.word("copy"));

  // calls `work` once, `wait` milliseconds after the last call
  board.later = (work, wait = 200) => {
    let timer = null;
    return (...values) => {
      clearTimeout(timer);
      timer = setTimeout(() => work(...values), wait);
    };
  };
  // Other buttons in the place of those before: who has the focus on one of them (a dialog gives it back) keeps
  // it there.
  board.refill = (element, buttons) => {
    const action = element.contains(document.activeElement) ? document.activeElement.dataset.action : null;
    board.fill(element, buttons);
    if (action !== null)
      (element.querySelector(`[data-action="${action}"]`) || element.querySelector("button"))?.focus();
  };
  // an error of a request, where it belongs
  board.failed = (element, error) =>
    board.fill(element, board.h("p", { class: "bad", role: "alert" }, board.visible(error.message)));
  board.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Tabs: [{name, title, fill(panel) -> stop | undefined}]; arrow keys go along them. Returns { element, stop }.
  board.tabs = (tabs, chosen, label, onchange) => {
    let stop = null;
    const panel = board.h("div", { role: "tabpanel", id: "tabpanel", tabindex: "0", class: "panel" });
    const select = (name, focus) => {
      if (stop) stop();
      for (const button of buttons) {
        const isChosen = button.dataset.tab === name;
        button.setAttribute("aria-selected", String(isChosen));
        button.tabIndex = isChosen ? 0 : -1;
        if (isChosen) {
          panel.setAttribute("aria-labelledby", button.id);
          if (focus) button.focus();
        }
      }
      board.fill(panel);
      stop = tabs.find((tab) => tab.name === name).fill(panel) || null;
      onchange(name);
    };
    const buttons = tabs.map((tab) =>
      board.h(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${tab.name}`,
          "data-tab": tab.name,
          "aria-controls": "tabpanel",
          onclick: () => select(tab.name),
        },
        tab.title,
      ),
    );
    const onkeydown = (event) => {
      const place = buttons.indexOf(document.activeElement);
      const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (next === undefined || place < 0) return;
      event.preventDefault();
      select(buttons[(next + buttons.length) % buttons.length].dataset.tab, true);
    };
    const element = board.h(
      "div",
      {},
      board.h("div", { role: "tablist", "aria-label": label, class: "tabs", onkeydown }, buttons),
      panel,
    );
    select(tabs.some((tab) => tab.name === chosen) ? chosen : tabs[0].name);
    return { element, stop: () => stop && stop() };
  };
  board.toggle = (set, value, isOn) => (isOn ? set.add(value) : set.delete(value));
}
