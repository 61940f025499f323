"use strict";
{
  // Pictures of many runs: curves, a metric against a knob or another metric, parallel coordinates.
  const MOST = board.mostCurves;

  const kinds = ["lines", "scatter", "parallel"];
  board.views.curves = {
    show: (element, _, parameters) => {
      let current = { ...parameters };
      let ids = parameters.ids ? parameters.ids.split("\n") : null;
      let panel = null;
      const filter = board.h("input", {
        type: "search",
        id: "filter",
        value: parameters.filter || "",
        autocomplete: "off",
        spellcheck: "false",
        placeholder: "state:running lr>1e-4",
        oninput: board.later(() => {
          drawList();
        }, 250),
      });
      const problem = board.h("p", { class: "bad", role: "status" });
      const list = board.h("ul", { class: "picks" });
      const count = board.h("span", { class: "faint small", role: "status" });
      const place = board.h("div", { class: "pictures" });
      const rows = () => [...board.store.rows.values()];
      const newest = (all) => board.sorted(all, (row) => row.started || row.updated, true);
      const chosen = () => {
        if (parameters.sweep)
          return rows().filter((row) => row.sweep === parameters.sweep && (!ids || ids.includes(row.id)));
        if (ids) return ids.map((id) => board.store.rows.get(id)).filter(Boolean);
        const pins = board.setting("pins", []);
        const pinned = rows().filter((row) => pins.includes(row.id));
        return pinned.length ? pinned : newest(rows()).slice(0, 10);
      };
      const change = (more) => {
        current = { ...current, ...more };
        history.replaceState(
          null,
          "",
          board.address(
            "curves",
            "",
            Object.fromEntries(Object.entries(current).filter(([, value]) => value !== undefined)),
          ),
        );
      };
      const choose = (next) => {
        ids = next;
        change({ ids: next.join("\n"), filter: filter.value || undefined });
        drawList();
        refresh();
      };
      let passing = [];
      const drawList = async () => {
        const passes = await board.filter(filter.value).catch((error) => ({ test: () => true, error: error.message }));
        problem.textContent = passes.error || "";
        const on = new Set(chosen().map((row) => row.id));
        const colours = board.colours([...on]);
        passing = newest(rows()).filter(
          (row) => passes.test(row) && (!parameters.sweep || row.sweep === parameters.sweep),
        );
        const labels = board.labels(passing);
        const focused = document.activeElement?.dataset?.pick;
        count.textContent =
          board.word("chosenOf", { n: on.size, all: rows().length }) +
          (on.size > MOST ? ` ${board.word("tooMany", { n: MOST })}` : "");
        board.fill(
          list,
          passing.slice(0, 200).map((row) =>
            board.h(
              "li",
              {},
              board.h(
                "label",
                { title: board.line(row.id) },
                board.h("input", {
                  type: "checkbox",
                  checked: on.has(row.id),
                  "data-pick": row.id,
                  onchange: (event) =>
                    choose(event.target.checked ? [...on, row.id] : [...on].filter((id) => id !== row.id)),
                }),
                on.has(row.id) ? board.swatch(colours.get(row.id)) : null,
                board.h("span", {}, labels.get(row.id)),
              ),
            ),
          ),
          passing.length > 200
            ? board.h("li", { class: "faint small" }, board.word("showMore", { n: 200, all: passing.length }))
            : null,
        );
        if (focused) [...list.querySelectorAll("input")].find((box) => box.dataset.pick === focused)?.focus();
      };
      const refresh = () => panel && panel.update();
      const tabs = board.tabs(
        kinds.map((name) => ({
          name,
          title: board.word(`kind.${name}`),
          fill: (inner) => {
            panel =
              name === "lines"
                ? board.curvePanel({ runs: chosen, parameters: current, onchange: change })
                : board[name === "scatter" ? "scatterPanel" : "parallelPanel"]({
                    runs: chosen,
                    parameters: current,
                    onchange: change,
                  });
            inner.append(panel.element);
            if (board.store.version !== null) panel.update();
            const own = panel;
            return () => own.close();
          },
        })),
        parameters.kind || "lines",
        board.word("curves"),
        (kind) => change({ kind: kind === "lines" ? undefined : kind }),
      );
      place.append(tabs.element);
      board.fill(
        element,
        board.h("h1", { class: "hidden" }, board.word("curves")),
        board.h(
          "div",
          { class: "split" },
          board.h(
            "section",
            { class: "side card", "aria-labelledby": "picks-title" },
            board.h("h2", { id: "picks-title" }, board.word("runs")),
            parameters.sweep
              ? board.h(
                  "p",
                  { class: "small" },
                  board.word("sweep"),
                  " ",
                  board.h("a", { href: board.address("sweep", parameters.sweep) }, board.line(parameters.sweep)),
                )
              : null,
            board.h("label", {}, board.h("span", { class: "hidden" }, board.word("filter")), filter),
            problem,
            board.h(
              "div",
              { class: "buttons" },
              board.h(
                "button",
                { type: "button", class: "small", onclick: () => choose(passing.slice(0, MOST).map((row) => row.id)) },
                board.word("all"),
              ),
              board.h("button", { type: "button", class: "small", onclick: () => choose([]) }, board.word("none")),
              count,
            ),
            list,
          ),
          place,
        ),
      );
      let seen = -1;
      const stop = board.watchRuns(() => {
        if (board.store.rows.size === seen) return;
        seen = board.store.rows.size;
        drawList();
        refresh();
      });
      return () => {
        stop();
        tabs.stop();
      };
    },
  };
}
