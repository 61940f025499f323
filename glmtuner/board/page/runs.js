"use strict";
{
  // The table of all runs, and of the sweeps above it.
  const sweepTable = () =>
    board.table({
      caption: board.word("sweeps"),
      rowAttributes: (sweep) => ({ "data-sweep": sweep.id }),
      limit: 200,
      columns: [
        {
          key: "check",
          title: "",
          text: (sweep) => String(board.checked.has(sweep.id)),
          className: "narrow",
          head: () => board.h("span", { class: "hidden" }, board.word("selection")),
          make: (sweep) =>
            board.h("input", {
              type: "checkbox",
              checked: board.checked.has(sweep.id),
              "aria-label": board.word("check", { name: board.line(sweep.name) }),
              onchange: (event) => {
                board.toggle(board.checked, sweep.id, event.target.checked);
                window.dispatchEvent(new Event("board-checked"));
              },
            }),
        },
        {
          key: "name",
          title: board.word("sweep"),
          isRowHeader: true,
          first: true,
          text: (sweep) => sweep.name,
          make: (sweep) => board.h("a", { href: board.address("sweep", sweep.id) }, board.line(sweep.name)),
          sort: (sweep) => sweep.name,
        },
        {
          key: "jobs",
          title: board.word("jobs"),
          isNumber: true,
          text: (sweep) => board.number(sweep.jobs?.length ?? sweep.jobs),
          sort: (sweep) => sweep.jobs?.length ?? sweep.jobs,
        },
        {
          key: "count",
          title: board.word("column.state"),
          text: (sweep) => JSON.stringify(sweep.count),
          make: (sweep) => board.counts(sweep.count),
        },
        {
          key: "objective",
          title: board.word("objective"),
          text: (sweep) => [sweep.objective || []].flat().join(", "),
        },
        {
          key: "eta",
          title: board.word("column.eta"),
          isNumber: true,
          text: (sweep) => board.duration(sweep.eta),
          sort: (sweep) => sweep.eta,
        },
        {
          key: "summary",
          title: board.word("summary"),
          className: "wide",
          text: (sweep) => board.line(sweep.summary || ""),
        },
      ],
    });
  board.views.runs = {
    show: (element, _, parameters) => {
      const pins = new Set(board.setting("pins", []));
      let chosen = board.setting("columns", null);
      let added = board.setting("added-columns", []);
      let sort = board.setting("sort", { key: "age", isDown: false });
      let group = parameters.group ?? board.setting("group", "");
      let passes = { test: () => true, error: null };
      let groupValues = null;
      const closed = new Set();
      const extra = {};
      let columns = [];
      let known = "";

      const filter = board.h("input", {
        type: "search",
        id: "filter",
        value: parameters.filter || "",
        placeholder: "state:running lr>1e-4",
        autocomplete: "off",
        spellcheck: "false",
        "aria-describedby": "filter-help filter-error",
        oninput: board.later(() => apply(), 250),
      });
      const problem = board.h("p", { class: "bad", id: "filter-error", role: "status" });
      const groups = board.h("input", {
        id: "group",
        list: "group-keys",
        value: group,
        placeholder: board.word("groupNone"),
        autocomplete: "off",
        spellcheck: "false",
        onchange: () => regroup(),
      });
      const options = board.h("datalist", { id: "group-keys" });
      const count = board.h("span", { class: "faint", role: "status" });
      const buttons = board.h("span", { class: "buttons" });
      const picker = board.h("div", { class: "menu card" });
      const chooser = board.h(
        "details",
        { class: "chooser", ontoggle: () => drawPicker() },
        board.h("summary", {}, board.word("columns")),
        picker,
      );
      const empty = board.h("p", { class: "faint", hidden: true });
      const written = board.h("div", { class: "small faint" });
      if (window.glmtunerStatic) {
        board
          .get("about")
          .then((about) =>
            board.fill(
              written,
              board.h("p", {}, board.word("writtenAt", { time: board.date(about.time) })),
              (about.left_out || []).length
                ? board.h(
                    "ul",
                    {},
                    about.left_out.map((text) => board.h("li", {}, board.visible(text))),
                  )
                : null,
            ),
          )
          .catch(() => {});
      }
      const problems = board.h("ul", { class: "small faint" });
      const sweeps = sweepTable();
      const sweepBox = board.h(
        "section",
        { hidden: true, "aria-labelledby": "sweeps-title" },
        board.h("h2", { id: "sweeps-title" }, board.word("sweeps")),
        sweeps.element,
      );

      const table = board.table({
        caption: board.word("runs"),
        columns: [],
        sort,
        className: "tall",
        rowAttributes: (row) => ({
          "data-run": row.id,
          "data-state": row.state,
          class: pins.has(row.id) ? "pinned" : null,
        }),
        onsort: (next) => {
          sort = next;
          board.remember("sort", sort);
          draw();
        },
      });
      const rows = () => [...board.store.rows.values()];

      const setColumns = (isForced) => {
        const all = rows();
        const next = board.runColumns({
          rows: all,
          pins,
          extra,
          oncheck: drawButtons,
          onpin: (id) => {
            board.toggle(pins, id, !pins.has(id));
            board.remember("pins", [...pins]);
            setColumns(true);
            draw();
          },
        });
        const visible = board.shownColumns(next, chosen, all);
        const names = `${visible.map((column) => column.key)}|${next.length}`;
        if (names === known && !isForced) return;
        known = names;
        columns = next;
        table.setColumns(visible);
      };
      const drawPicker = () => {
        const visible = new Set(table.columns.map((column) => column.key));
        const add = board.h("input", {
          list: "group-keys",
          id: "add-column",
          autocomplete: "off",
          spellcheck: "false",
          onchange: (event) => addColumn(event.target.value),
        });
        board.fill(
          picker,
          columns
            .filter((column) => !column.isFixed)
            .map((column) =>
              board.h(
                "label",
                {},
                board.h("input", {
                  type: "checkbox",
                  checked: visible.has(column.key),
                  onchange: (event) => {
                    board.toggle(visible, column.key, event.target.checked);
                    chosen = [...visible];
                    board.remember("columns", chosen);
                    setColumns();
                    draw();
                  },
                }),
                " ",
                column.title,
              ),
            ),
          board.h("label", { for: "add-column" }, board.word("addColumn")),
          add,
          board.h(
            "button",
            {
              type: "button",
              onclick: () => {
                chosen = null;
                added = [];
                board.remember("columns", null);
                board.remember("added-columns", []);
                for (const key of Object.keys(extra)) delete extra[key];
                setColumns();
                draw();
                drawPicker();
              },
            },
            board.word("usualColumns"),
          ),
        );
      };
      const addColumn = async (word) => {
        const key = board.keyFor(word.trim(), await board.keys());
        if (!key) return board.notice(board.word("noSuchKey", { key: board.line(word) }), true);
        try {
          extra[key] = await board.valuesOf(key);
        } catch (error) {
          return board.notice(error.message, true);
        }
        if (!added.includes(key)) board.remember("added-columns", (added = [...added, key]));
        if (chosen) board.remember("columns", (chosen = [...new Set([...chosen, `key:${key}`])]));
        setColumns();
        draw();
        drawPicker();
      };
      const drawButtons = () => {
        const ids = [...board.checked];
        const runIds = ids.filter((id) => board.store.rows.has(id));
        const isSweeps = ids.length === 2 && !runIds.length;
        const go = (view, parameters) =>
          board.h(
            "button",
            { type: "button", onclick: () => board.go(view, "", parameters) },
            board.word(view === "curves" ? "showCurves" : "compareThem", {
              n: view === "curves" ? runIds.length : ids.length,
            }),
          );
        board.fill(
          buttons,
          runIds.length ? go("curves", { ids: runIds.join("\n") }) : null,
          isSweeps || (ids.length > 1 && runIds.length === ids.length) ? go("compare", { ids: ids.join("\n") }) : null,
          runIds.length && board.actionsFor ? board.actionsFor(runIds.map((id) => board.store.rows.get(id))) : null,
          ids.length
            ? board.h(
                "button",
                {
                  type: "button",
                  onclick: () => {
                    board.checked.clear();
                    draw();
                    sweeps.update(board.store.sweeps);
                    drawButtons();
                  },
                },
                board.word("uncheck"),
              )
            : null,
        );
      };
      const address = () => history.replaceState(null, "", board.address("runs", "", { filter: filter.value, group }));
      const apply = async () => {
        const text = filter.value;
        const next = await board.filter(text).catch((error) => ({ test: () => true, error: error.message }));
        if (filter.value !== text) return;
        passes = next;
        problem.textContent = passes.error || "";
        address();
        draw();
      };
      const regroup = async () => {
        const word = groups.value.trim();
        groupValues = null;
        group = "";
        problem.textContent = "";
        if (word) {
          const field = {
            state: (row) => board.maybe("state", row.state),
            sweep: (row) => row.sweep,
            stage: (row) => row.stage,
            model: (row) => row.model,
            method: (row) => row.method,
            quant: (row) => row.quant,
            data: (row) => row.data,
          }[word];
          const key = field
            ? word
            : board.keyFor(word, [...new Set([...board.knobsOf(rows()), ...(await board.keys())])]);
          if (!key) problem.textContent = board.word("noSuchKey", { key: board.line(word) });
          else {
            try {
              const values = field ? null : await board.valuesOf(key);
              groupValues = field || ((row) => (row.id in values ? board.value(values[row.id]) : null));
              group = key;
            } catch (error) {
              problem.textContent = error.message;
            }
          }
        }
        board.remember("group", group);
        address();
        draw();
      };
      const mean = (column, members) => {
        const values = members
          .map((row) => column.value?.(row))
          .filter((value) => typeof value === "number" && Number.isFinite(value));
        if (!values.length) return "";
        return values.length === 1
          ? board.number(values[0])
          : `${board.word("mean")} ${board.number(values.reduce((sum, value) => sum + value, 0) / values.length)} (${board.number(Math.min(...values))} … ${board.number(Math.max(...values))})`;
      };
      const grouped = (ordered) => {
        const groupsOf = new Map();
        for (const row of ordered) {
          const name = groupValues(row) ?? board.word("without", { key: group });
          if (!groupsOf.has(name)) groupsOf.set(name, []);
          groupsOf.get(name).push(row);
        }
        return [...groupsOf].flatMap(([name, members]) => {
          const isOpen = !closed.has(name);
          const heading = {
            id: `\n${name}`,
            heading: `${board.short(name, 60)} (${members.length})`,
            isOpen,
            toggle: () => {
              board.toggle(closed, name, isOpen);
              draw();
            },
            columns: Object.fromEntries(
              table.columns
                .filter((column) => column.value && column.key !== "step")
                .map((column) => [column.key, mean(column, members)]),
            ),
          };
          return [heading, ...(isOpen ? members : [])];
        });
      };
      const draw = () => {
        const all = rows();
        const passing = all.filter(passes.test);
        const column = sort && columns.find((each) => each.key === sort.key);
        const ordered = column ? board.sorted(passing, column.sort, sort.isDown) : passing;
        const top = ordered.filter((row) => pins.has(row.id));
        const rest = ordered.filter((row) => !pins.has(row.id));
        table.update([...top, ...(groupValues ? grouped(rest) : rest)]);
        count.textContent =
          passing.length === all.length
            ? board.word("countAll", { n: all.length })
            : board.word("countSome", { n: passing.length, all: all.length });
        empty.hidden = passing.length > 0 || board.store.version === null;
        empty.textContent = all.length ? board.word("noneFound") : board.word("noRuns");
      };
      const update = async () => {
        if (board.store.version === null) return;
        sweepBox.hidden = !board.store.sweeps.length;
        sweeps.update(board.store.sweeps);
        const messages = board.store.problems.map(({ id, message }) =>
          board.word("cannotShow", { id: board.line(id), message: board.visible(message) }),
        );
        if (messages.join() !== [...problems.children].map((line) => line.textContent).join())
          board.fill(
            problems,
            messages.map((text) => board.h("li", {}, text)),
          );
        setColumns();
        draw();
      };
      const exportCsv = () =>
        board.download("runs.csv", "text/csv", board.csv(table.texts().map((row) => row.slice(1))));
      const keypress = (event) => {
        if (event.key !== "/" || /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName)) return;
        event.preventDefault();
        filter.focus();
      };
      document.addEventListener("keydown", keypress);
      window.addEventListener("board-checked", drawButtons);

      board.fill(
        element,
        board.h("h1", { class: "hidden" }, board.word("runs")),
        sweepBox,
        board.h(
          "section",
          { "aria-labelledby": "runs-title" },
          board.h(
            "div",
            { class: "bar" },
            board.h("h2", { id: "runs-title" }, board.word("runs")),
            count,
            board.h("label", { class: "grow" }, board.h("span", { class: "hidden" }, board.word("filter")), filter),
            board.h("label", {}, board.word("groupBy"), " ", groups),
            options,
            chooser,
            board.h("button", { type: "button", onclick: exportCsv }, "CSV"),
            buttons,
          ),
          board.h(
            "details",
            { class: "help small" },
            board.h("summary", {}, board.word("filterHow")),
            board.h("p", { id: "filter-help" }, board.word("filterHelp")),
          ),
          problem,
          table.element,
          empty,
          problems,
          written,
          window.glmtunerStatic || !board.views.trash
            ? null
            : board.h("p", { class: "small" }, board.h("a", { href: "#/trash" }, board.word("act.trash"))),
        ),
      );
      drawButtons();
      let isFirst = true;
      const stop = board.watchRuns(async () => {
        await update();
        if (!isFirst || board.store.version === null) return;
        isFirst = false;
        if (filter.value) apply();
        if (group) regroup();
        const keys = await board.keys();
        board.fill(
          options,
          ["state", "sweep", "stage", "model", "method", "quant", "data", ...keys].map((key) =>
            board.h("option", { value: key }),
          ),
        );
        for (const key of added) if (keys.includes(key)) extra[key] = await board.valuesOf(key).catch(() => ({}));
        if (added.length) update();
      });
      const ages = window.glmtunerStatic ? null : setInterval(() => draw(), 20000);
      return () => {
        stop();
        clearInterval(ages);
        document.removeEventListener("keydown", keypress);
        window.removeEventListener("board-checked", drawButtons);
      };
    },
  };
}
