"use strict";
{
  // Two runs or sweeps as `glmtuner diff` compares them, and what differs between any number of runs.
  const MOST = 12; // runs in one table

  const difference = (place, a, b) => {
    const box = board.h("div", {}, board.h("p", { class: "faint", role: "status" }, board.word("comparing")));
    place.append(box);
    board
      .get("compare", { a, b })
      .then((found) => {
        board.fill(
          box,
          found.verdict ? board.h("p", { class: "verdict card" }, board.visible(found.verdict)) : null,
          (found.sections || []).map((section) =>
            board.h(
              "section",
              { class: "card" },
              board.h(
                "h3",
                {},
                board.visible(section.title),
                section.is_difference === false
                  ? board.h("small", { class: "faint" }, ` ${board.word("information")}`)
                  : null,
              ),
              (section.sentences || []).map((text) => board.h("p", {}, board.visible(text))),
              section.rows?.length
                ? board.plainTable(board.line(section.title), section.header, section.rows, section.has_texts)
                : null,
            ),
          ),
        );
      })
      .catch((error) => board.failed(box, error));
  };
  // configuration and results of several runs, a column a run; keys on which all agree are left out unless asked for
  const table = (infos, isAll) => {
    const labels = board.labels(infos.map((info) => info.row));
    const same = (values) => values.every((value) => JSON.stringify(value) === JSON.stringify(values[0]));
    const lines = (name) => {
      const keys = [...new Set(infos.flatMap((info) => Object.keys(info[name] || {})))];
      if (name === "metrics") keys.sort((a, b) => board.isCost(a) - board.isCost(b));
      return keys
        .map((key) => [key, infos.map((info) => info[name]?.[key])])
        .filter(([, values]) => isAll || !same(values));
    };
    const text = (value) => (value === undefined ? "–" : board.visible(board.value(value)));
    const rows = (name, shown) =>
      lines(name).map(([key, values]) =>
        board.h(
          "tr",
          { class: isAll && !same(values) ? "differs" : null },
          board.h("th", { scope: "row" }, board.line(key)),
          values.map((value, place) =>
            board.h("td", { class: name === "metrics" ? "number" : null }, shown(value, infos[place], key)),
          ),
        ),
      );
    const heading = (title) =>
      board.h("tr", { class: "group" }, board.h("th", { scope: "colgroup", colspan: String(infos.length + 1) }, title));
    const results = rows("metrics", (value, info, key) =>
      typeof value === "number" ? board.measured(key, value, info.row.intervals?.[key]) : "–",
    );
    const configuration = rows("config", (value) => text(value));
    return board.h(
      "div",
      { class: "scroll tall", tabindex: "0", role: "region", "aria-label": board.word("compare") },
      board.h(
        "table",
        {},
        board.h("caption", { class: "hidden" }, board.word("compare")),
        board.h(
          "thead",
          {},
          board.h(
            "tr",
            {},
            board.h("th", { scope: "col", class: "first" }, board.word("key")),
            infos.map((info) =>
              board.h(
                "th",
                { scope: "col" },
                board.h(
                  "a",
                  { href: board.address("run", info.row.id), title: board.line(info.row.id) },
                  labels.get(info.row.id),
                ),
              ),
            ),
          ),
        ),
        board.h(
          "tbody",
          {},
          results.length ? heading(board.word("results")) : null,
          results,
          configuration.length ? heading(board.word("tab.config")) : null,
          configuration,
        ),
      ),
    );
  };

  board.views.compare = {
    show: (element, _, parameters) => {
      let ids = (parameters.ids || "").split("\n").filter(Boolean);
      let curves = null;
      let isClosed = false;
      const add = board.h("input", {
        id: "compare-add",
        list: "compare-runs",
        autocomplete: "off",
        spellcheck: "false",
        onchange: (event) => event.target.value && set([...ids, event.target.value]),
      });
      const options = board.h("datalist", { id: "compare-runs" });
      const picked = board.h("ul", { class: "legend", "aria-label": board.word("compared") });
      const place = board.h("div");
      const set = (next) => {
        ids = [...new Set(next)];
        history.replaceState(null, "", board.address("compare", "", { ids: ids.join("\n") }));
        draw();
      };
      const isSweep = (id) => board.store.sweeps.some((sweep) => sweep.id === id) && !board.store.rows.has(id);
      const draw = async () => {
        if (curves) curves.close();
        curves = null;
        const labels = board.labels(ids.map((id) => board.store.rows.get(id)).filter(Boolean));
        board.fill(
          picked,
          ids.map((id) =>
            board.h(
              "li",
              {},
              board.h(
                "a",
                { href: board.address(isSweep(id) ? "sweep" : "run", id), title: board.line(id) },
                labels.get(id) || board.line(id),
              ),
              " ",
              board.h(
                "button",
                {
                  type: "button",
                  class: "only",
                  "aria-label": board.word("leaveOut", { name: board.line(id) }),
                  onclick: () => set(ids.filter((each) => each !== id)),
                },
                "×",
              ),
            ),
          ),
        );
        board.fill(place);
        if (ids.length < 2) return place.append(board.h("p", { class: "faint" }, board.word("pickTwo")));
        const sweeps = ids.filter(isSweep);
        if (sweeps.length && sweeps.length < ids.length)
          return place.append(board.h("p", { class: "bad", role: "alert" }, board.word("notMixed")));
        if (!sweeps.length) {
          const shown = ids.slice(0, MOST);
          const infos = await Promise.all(shown.map((id) => board.get("run", { id }))).catch(
            (error) => void board.failed(place, error),
          );
          if (isClosed || !infos) return;
          const box = board.h("div");
          const all = board.h("input", {
            type: "checkbox",
            id: "all-keys",
            onchange: () => board.fill(box, table(infos, all.checked)),
          });
          board.fill(box, table(infos, false));
          place.append(
            board.h("h2", {}, board.word("sideBySide")),
            board.h("label", {}, all, " ", board.word("alsoEqual")),
            box,
          );
          if (ids.length > MOST)
            place.append(board.h("p", { class: "faint" }, board.word("firstOnly", { n: MOST, all: ids.length })));
          curves = board.curvePanel({ runs: () => ids.map((id) => board.store.rows.get(id)).filter(Boolean) });
          place.append(board.h("h2", {}, board.word("curves")), curves.element);
          curves.update();
        }
        if (window.glmtunerStatic) return;
        for (const other of ids.slice(1, 4)) {
          place.append(
            board.h(
              "h2",
              {},
              board.word("differenceOf", {
                a: labels.get(ids[0]) || board.line(ids[0]),
                b: labels.get(other) || board.line(other),
              }),
            ),
          );
          difference(place, ids[0], other);
        }
        if (ids.length > 4) place.append(board.h("p", { class: "faint" }, board.word("differencesOnly", { n: 3 })));
      };
      board.fill(
        element,
        board.h("h1", {}, board.word("compare")),
        board.h("div", { class: "bar" }, picked, board.h("label", {}, board.word("add"), " ", add), options),
        place,
      );
      let isFirst = true;
      const stop = board.watchRuns(() => {
        if (!isFirst || board.store.version === null) return;
        isFirst = false;
        board.fill(
          options,
          [...board.store.sweeps.map((sweep) => sweep.id), ...board.store.rows.keys()]
            .slice(0, 1000)
            .map((id) => board.h("option", { value: id })),
        );
        draw();
      });
      return () => {
        isClosed = true;
        stop();
        if (curves) curves.close();
      };
    },
  };
}
