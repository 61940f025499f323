"use strict";
{
  // One run: what it was asked to do, what came of it, its answers, its data and its log.
  board.place = (row) =>
    row.sweep ? board.h("a", { href: board.address("sweep", row.sweep) }, board.line(row.sweep)) : null;
  const facts = (pairs) =>
    board.h(
      "dl",
      {},
      pairs
        .filter(([, value]) => value !== null && value !== undefined && value !== "")
        .map(([name, value]) => [
          board.h("dt", {}, name),
          board.h("dd", {}, value instanceof Node ? value : board.visible(value)),
        ]),
    );
  const code = (text) => board.h("pre", { tabindex: "0" }, board.visible(text));
  const copied = (title, text) =>
    board.h(
      "section",
      {},
      board.h(
        "div",
        { class: "bar" },
        board.h("h2", { class: "minor" }, title),
        board.copyButton(() => text),
      ),
      code(text),
    );
  board.facts = facts;

  const overview = (info, row) => (panel) => {
    // results before costs
    const metrics = Object.entries(info.metrics || {}).sort(([a], [b]) => board.isCost(a) - board.isCost(b));
    const intervals = row.intervals || {};
    const curves = board.curvePanel({ runs: () => [board.store.rows.get(info.row.id)].filter(Boolean) });
    const live = board.h("div");
    const drawLive = (now) =>
      board.fill(
        live,
        facts([
          [board.word("column.state"), board.h("span", {}, board.chip(now))],
          [board.word("column.note"), now.note],
          [board.word("sweep"), board.place(now)],
          [board.word("column.stage"), now.stage],
          [board.word("column.model"), now.model],
          [
            board.word("column.method"),
            [now.method, now.quant === "none" ? null : now.quant].filter(Boolean).join(", "),
          ],
          [board.word("column.data"), now.data],
          [
            board.word("column.step"),
            now.step === null || now.step === undefined ? null : `${now.step}${now.steps ? ` / ${now.steps}` : ""}`,
          ],
          [board.word("column.epoch"), board.number(now.epoch)],
          [board.word("column.loss"), board.number(now.loss)],
          [board.word("column.speed"), board.number(now.tokens_per_second)],
          [board.word("column.memory"), board.number(now.memory_gib)],
          [board.word("column.eta"), now.state === "running" ? board.duration(now.eta_s) : null],
          [board.word("column.started"), board.date(now.started)],
          [board.word("column.updated"), board.date(now.updated)],
        ]),
      );
    drawLive(row);
    const results = board.plainTable(
      board.word("results"),
      [board.word("metric"), board.word("value")],
      metrics.map(([name, value]) => [
        name,
        value === null ? board.word("notFinite") : board.measured(name, value, intervals[name]),
      ]),
    );
    const failure = info.failure;
    panel.append(
      ...[
        failure
          ? board.h(
              "section",
              { class: "card failure" },
              board.h("h2", { class: "minor" }, board.word("failure")),
              board.h(
                "p",
                { class: "bad" },
                board.visible(failure.message || failure.error || JSON.stringify(failure)),
              ),
            )
          : null,
        board.h(
          "div",
          { class: "columns" },
          board.h("section", { class: "card" }, board.h("h2", { class: "minor" }, board.word("facts")), live),
          metrics.length
            ? board.h(
                "section",
                { class: "card" },
                board.h("h2", { class: "minor" }, board.word("results")),
                results,
                Object.keys(intervals).length
                  ? board.h("p", { class: "faint small" }, board.word("intervalHelp"))
                  : null,
              )
            : null,
        ),
        board.h("h2", { class: "minor" }, board.word("curves")),
        curves.element,
        info.command ? copied(board.word("command"), info.command) : null,
        info.cwd ? board.h("p", { class: "faint small" }, `${board.word("cwd")} ${board.visible(info.cwd)}`) : null,
        info.plan?.length
          ? board.h(
              "section",
              { class: "card" },
              board.h("h2", { class: "minor" }, board.word("plan")),
              facts(info.plan.map(([name, text]) => [board.line(name), text])),
            )
          : null,
        info.pictures?.length && !window.glmtunerStatic
          ? board.h(
              "details",
              {},
              board.h("summary", {}, board.word("pictures")),
              info.pictures.map((name) =>
                board.h("img", {
                  class: "picture",
                  loading: "lazy",
                  alt: board.line(name),
                  src: `files/picture?${new URLSearchParams({ id: info.row.id, name })}`,
                }),
              ),
            )
          : null,
        info.files?.length
          ? board.h(
              "details",
              {},
              board.h("summary", {}, board.word("files", { n: info.files.length })),
              board.plainTable(
                board.word("filesShort"),
                [board.word("file"), board.word("size")],
                info.files.map((file) => [file.name, file.bytes === null ? "" : board.bytes(file.bytes)]),
              ),
            )
          : null,
      ].filter(Boolean),
    );
    curves.update();
    const stop = board.watchRuns((changed) => {
      const now = board.store.rows.get(info.row.id);
      if (now && changed.includes(now.id)) drawLive(now);
    });
    return () => {
      stop();
      curves.close();
    };
  };

  const config = (info) => (panel) => {
    const defaults = info.defaults || {}; // null where the configuration can no longer be composed
    const search = board.h("input", {
      type: "search",
      id: "config-search",
      autocomplete: "off",
      spellcheck: "false",
      oninput: board.later(() => draw(), 150),
    });
    const only = board.h("input", {
      type: "checkbox",
      id: "only-different",
      checked: Object.keys(defaults).length > 0,
      onchange: () => draw(),
    });
    const place = board.h("div");
    const entries = Object.entries(info.config || {});
    const draw = () => {
      const wanted = search.value.toLowerCase();
      const rows = entries.filter(
        ([key, value]) =>
          (!only.checked || key in defaults) && `${key}=${board.value(value)}`.toLowerCase().includes(wanted),
      );
      const table = board.h(
        "table",
        {},
        board.h("caption", { class: "hidden" }, board.word("tab.config")),
        board.h(
          "thead",
          {},
          board.h(
            "tr",
            {},
            [board.word("key"), board.word("value"), board.word("default")].map((title) =>
              board.h("th", { scope: "col" }, title),
            ),
          ),
        ),
        board.h(
          "tbody",
          {},
          rows.map(([key, value]) =>
            board.h(
              "tr",
              { class: key in defaults ? "differs" : null },
              board.h("th", { scope: "row" }, board.line(key)),
              board.h(
                "td",
                {},
                key in defaults
                  ? board.h("strong", {}, board.visible(board.value(value)))
                  : board.visible(board.value(value)),
              ),
              board.h("td", { class: "faint" }, key in defaults ? board.visible(board.value(defaults[key])) : ""),
            ),
          ),
        ),
      );
      board.fill(
        place,
        board.h(
          "p",
          { class: "faint small", role: "status" },
          board.word("countSomeKeys", { n: rows.length, all: entries.length }),
        ),
        board.h(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": board.word("tab.config") },
          table,
        ),
      );
    };
    draw();
    panel.append(
      board.h(
        "div",
        { class: "bar" },
        board.h("label", {}, board.word("search"), " ", search),
        board.h("label", {}, only, " ", board.word("onlyDifferent")),
      ),
      ...(info.defaults ? [] : [board.h("p", { class: "faint small" }, board.word("noDefaults"))]),
      place,
      ...(info.yaml
        ? [
            board.h(
              "details",
              {},
              board.h("summary", {}, "config.yaml"),
              board.copyButton(() => info.yaml),
              code(info.yaml),
            ),
          ]
        : []),
    );
  };

  // any JSON as lists of names and values
  const tree = (value) => {
    if (Array.isArray(value))
      return value.every((each) => typeof each !== "object" || each === null)
        ? board.visible(value.map(board.value).join("\n"))
        : board.h(
            "ol",
            {},
            value.map((each) => board.h("li", {}, tree(each))),
          );
    if (value && typeof value === "object")
      return facts(
        Object.entries(value).map(([key, each]) => [
          board.line(key),
          each === null ? "null" : typeof each === "object" ? tree(each) : board.value(each),
        ]),
      );
    return board.visible(board.value(value));
  };
  const provenance = (info) => (panel) =>
    panel.append(
      Object.keys(info.provenance || {}).length
        ? board.h("div", { class: "card tree" }, tree(info.provenance))
        : board.h("p", { class: "faint" }, board.word("nothingHere")),
    );

  // The report of a run or sweep in a frame without scripts and without this page's origin.
  board.reportFrame = (id, info) => {
    if (!info.has?.report) return board.h("p", { class: "faint" }, board.word("noReport"));
    const source = window.glmtunerStatic ? info.report : `files/report?${new URLSearchParams({ id })}`;
    return board.h(
      "div",
      {},
      board.h(
        "p",
        { class: "small" },
        board.h("a", { href: source, target: "_blank", rel: "noopener" }, board.word("openAlone")),
      ),
      board.h("iframe", { class: "report", sandbox: "", src: source, title: board.word("tab.report") }),
    );
  };

  board.views.run = {
    show: (element, id, parameters) => {
      let tabs = null;
      let isClosed = false;
      const title = board.h("h1", {}, board.line(id.split("/").pop()));
      const chips = board.h("span", { class: "chips" });
      const actions = board.h("span", { class: "buttons" });
      const place = board.h("div", {}, board.h("p", { class: "faint", role: "status" }, board.word("loading")));
      const change = (more) => {
        parameters = { ...parameters, ...more };
        history.replaceState(
          null,
          "",
          board.address(
            "run",
            id,
            Object.fromEntries(Object.entries(parameters).filter(([, value]) => value !== undefined)),
          ),
        );
      };
      let drawn = "";
      const drawHead = (row) => {
        title.textContent = board.line(row.name);
        const now = JSON.stringify([row.state, row.mark, row.can, row.note]);
        if (now === drawn) return;
        drawn = now;
        board.fill(
          chips,
          board.chip(row),
          row.note ? board.h("span", { class: "note" }, board.short(row.note, 200)) : null,
        );
        if (board.actions) board.refill(actions, board.actions(row));
      };
      const load = async () => {
        try {
          const info = await board.get("run", { id });
          if (isClosed) return;
          drawHead(info.row);
          const has = info.has || {};
          const all = [
            { name: "overview", fill: overview(info, board.store.rows.get(id) || info.row) },
            { name: "config", fill: config(info) },
            { name: "provenance", fill: provenance(info) },
            { name: "report", fill: (panel) => void panel.append(board.reportFrame(id, info)) },
            has.predictions
              ? { name: "predictions", fill: (panel) => board.predictions(panel, id, parameters, change) }
              : null,
            has.samples ? { name: "samples", fill: board.samplesTab(info) } : null,
            has.log ? { name: "log", fill: board.logTab(info) } : null,
          ]
            .filter(Boolean)
            .map((tab) => ({ ...tab, title: board.word(`tab.${tab.name}`) }));
          if (tabs) tabs.stop();
          tabs = board.tabs(all, parameters.tab || "overview", board.line(info.row.name), (tab) =>
            change({ tab: tab === "overview" ? undefined : tab }),
          );
          board.fill(place, tabs.element);
        } catch (error) {
          if (!isClosed) board.failed(place, error);
        }
      };
      board.fill(
        element,
        board.h(
          "p",
          { class: "small crumbs" },
          board.h("a", { href: "#/runs" }, board.word("runs")),
          " / ",
          id
            .split("/")
            .slice(0, -1)
            .map((part) => `${board.line(part)} / `),
        ),
        board.h("div", { class: "bar" }, title, chips, actions),
        place,
      );
      load();
      let last = null;
      const stop = board.watchRuns(() => {
        const row = board.store.rows.get(id);
        if (!row) return;
        drawHead(row);
        // a run that has ended or begun has other files, tabs and results
        if (last !== null && last !== row.state) load();
        last = row.state;
      });
      return () => {
        isClosed = true;
        stop();
        if (tabs) tabs.stop();
      };
    },
  };
}
