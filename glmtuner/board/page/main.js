"use strict";
// The frame: navigation, language, theme, and which view the address asks for (#/runs, #/run/<id>?with=<id>, …).

// A view is board.views.<name> = { nav: true, show(element, id, parameters) → stop() | undefined }; `stop` ends its timers.
const tabs = ["runs", "curves", "start", "talk"];
let stop = null;

board.go = (view, id = "", parameters = {}) => {
  location.hash = board.address(view, id, parameters);
};
board.address = (view, id = "", parameters = {}) => {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== undefined && value !== ""));
  return `#/${view}${id ? `/${encodeURIComponent(id)}` : ""}${query.size ? `?${query}` : ""}`;
};

board.notice = (text, isError = false) => {
  const notice = board.h("p", { class: isError ? "notice bad" : "notice" }, text);
  document.getElementById("notices").append(notice);
  setTimeout(() => notice.remove(), isError ? 12000 : 5000);
};

const themes = ["system", "light", "dark"];
const frame = () => {
  document.documentElement.lang = board.language === "zh" ? "zh-CN" : "en";
  document.querySelector("[data-word=skip]").textContent = board.word("skip");
  const theme = board.setting("theme", "system");
  document.documentElement.dataset.theme = theme;
  const [, current] = location.hash.match(/^#\/(\w+)/) || [null, "runs"];
  const shown = tabs.filter((name) => board.views[name] && !(window.glmtunerStatic && board.views[name].isLive));
  board.fill(
    document.getElementById("nav"),
    board.h("strong", {}, "glmtuner"),
    shown.map((name) => board.h("a", { href: `#/${name}`, "aria-current": name === current ? "page" : null }, board.word(name))),
  );
  board.fill(
    document.getElementById("tools"),
    board.h("button", { type: "button", onclick: () => { board.language = board.language === "zh" ? "en" : "zh"; board.remember("language", board.language); route(); } }, board.word("language")),
    board.h(
      "label", {}, board.h("span", { class: "hidden" }, board.word("theme")),
      board.h("select", { id: "theme", onchange: (event) => { board.remember("theme", event.target.value); route(); } },
        themes.map((name) => board.h("option", { value: name, selected: name === theme }, board.word(name)))),
    ),
  );
};

const route = () => {
  if (stop) stop();
  stop = null;
  frame();
  const [, view = "runs", id = "", query = ""] = location.hash.match(/^#\/(\w+)(?:\/([^?]*))?(?:\?(.*))?$/) || [];
  const main = board.fill(document.getElementById("main"));
  if (!board.views[view]) return board.fill(main, board.h("p", { class: "bad" }, board.word("unknownPage")));
  stop = board.views[view].show(main, decodeURIComponent(id), Object.fromEntries(new URLSearchParams(query))) || null;
};
window.addEventListener("hashchange", route);
window.addEventListener("DOMContentLoaded", route);
