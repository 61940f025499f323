"use strict";
{
  // A sweep: the leaderboard with intervals, its jobs, their pictures, and how a race or a search decided.
  const jobId = (sweep, name) => (sweep === "." ? name : `${sweep}/${name}`);
  const bracket = (row, key) => {
    const value = row.values[key];
    if (value === null || value === undefined) return "–";
    const deviation = row.deviations?.[key];
    const [text, rest = ""] = board.measured(key, value, row.intervals?.[key]).split(/ (?=\[)/);
    return [
      text,
      deviation === undefined || deviation === null ? "" : ` ± ${board.number(deviation, 3)}`,
      rest ? board.h("small", { class: "faint block" }, rest) : null,
    ];
  };
  const leaderboard = (info) => {
    const { columns, rows } = info.leaderboard;
    if (!rows.length) return board.h("p", { class: "faint" }, board.word("noResults"));
    const knobs = columns.filter((column) => column.kind === "knob");
    const scores = columns.filter((column) => column.kind !== "knob");
    const hasDifference = rows.some((row) => row.difference);
    const difference = (row) => {
      if (!row.difference) return "";
      const [value, low, high] = row.difference;
      return [
        board.score(value, [low, high]),
        row.differs === false ? board.h("small", { class: "block faint" }, board.word("notTold")) : null,
      ];
    };
    const line = (row, rank, isSeed) =>
      board.h(
        "tr",
        { class: isSeed ? "seed" : rank === 1 ? "best" : null },
        board.h("th", { scope: "row", class: "number" }, isSeed ? "" : String(rank)),
        knobs.length
          ? knobs.map((column) =>
              board.h("td", {}, isSeed ? "" : board.short(board.value(row.settings[column.key]), 60)),
            )
          : board.h("td", {}, board.line(row.label)),
        board.h(
          "td",
          {},
          row.jobs.length === 1
            ? board.h(
                "a",
                { href: board.address("run", jobId(info.id, row.jobs[0])), title: board.line(row.jobs[0]) },
                row.seed === null || row.seed === undefined ? board.word("run") : board.word("seed", { n: row.seed }),
              )
            : board.word("seedRuns", { n: row.jobs.length }),
        ),
        scores.map((column) => board.h("td", { class: "number" }, bracket(row, column.key))),
        hasDifference ? board.h("td", { class: "number" }, difference(row)) : null,
      );
    const arrow = (column) => (column.better === "low" ? " ↓" : column.better === "high" ? " ↑" : "");
    const help = (column) =>
      column.better ? board.word(column.better === "low" ? "lessIsBetter" : "moreIsBetter") : null;
    return board.h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": board.word("leaderboard") },
      board.h(
        "table",
        { id: "leaderboard" },
        board.h("caption", { class: "hidden" }, board.word("leaderboard")),
        board.h(
          "thead",
          {},
          board.h(
            "tr",
            {},
            board.h("th", { scope: "col", class: "number" }, "#"),
            knobs.length
              ? knobs.map((column) =>
                  board.h("th", { scope: "col", title: board.line(column.key) }, board.line(column.title)),
                )
              : board.h("th", { scope: "col" }, board.word("run")),
            board.h("th", { scope: "col" }, board.word("run")),
            scores.map((column) =>
              board.h(
                "th",
                { scope: "col", class: "number", title: help(column) },
                board.line(column.title),
                arrow(column),
              ),
            ),
            hasDifference ? board.h("th", { scope: "col", class: "number" }, board.word("toTheBest")) : null,
          ),
        ),
        board.h(
          "tbody",
          {},
          rows.map((row, place) => [
            line(row, place + 1, false),
            (row.seeds || []).length > 1 ? row.seeds.map((seed) => line(seed, 0, true)) : null,
          ]),
        ),
      ),
    );
  };
  const pareto = (info) => {
    const { objectives, best, others, sentence } = info.pareto;
    const [first, second] = objectives.map((objective) => objective.key);
    const point = ({ job, label, values }) => ({
      id: jobId(info.id, job),
      label,
      values: { [first]: values[0], [second]: values[1] },
    });
    return [
      board.h("p", {}, board.visible(sentence)),
      board.frontPicture({
        objectives: [first, second],
        titles: objectives.map((objective) => objective.title),
        better: objectives.map((objective) => objective.better),
        best: best.map((each) => jobId(info.id, each.job)),
        points: [...best, ...others].map(point),
      }),
    ];
  };

  board.views.sweep = {
    show: (element, id, parameters) => {
      let info = null;
      let tabs = null;
      let isClosed = false;
      let timer = null;
      let isLoading = false;
      let isStale = false;
      const title = board.h("h1", {}, board.line(id.split("/").pop()));
      const head = board.h("div");
      const actions = board.h("span", { class: "buttons" });
      let counted = "";
      const place = board.h("div", {}, board.h("p", { class: "faint", role: "status" }, board.word("loading")));
      const results = board.h("div");
      const decisions = board.h("div");
      const rows = () => [...board.store.rows.values()].filter((row) => row.sweep === id);
      const change = (more) => {
        parameters = { ...parameters, ...more };
        history.replaceState(
          null,
          "",
          board.address(
            "sweep",
            id,
            Object.fromEntries(Object.entries(parameters).filter(([, value]) => value !== undefined)),
          ),
        );
      };
      const embedded = (make) => (panel) => {
        const inner = make({ runs: rows, parameters, onchange: change });
        panel.append(inner.element);
        inner.update();
        return () => inner.close();
      };
      const jobs = (panel) => {
        const known = () =>
          board.shownColumns(
            board.runColumns({ rows: rows(), pins: new Set(), oncheck: () => drawChecked() }),
            null,
            rows(),
          );
        const checked = board.h("div", { class: "buttons" });
        const drawChecked = () => {
          const ids = rows()
            .map((row) => row.id)
            .filter((each) => board.checked.has(each));
          board.fill(
            checked,
            ids.length
              ? board.h(
                  "a",
                  { href: board.address("curves", "", { ids: ids.join("\n") }) },
                  board.word("showCurves", { n: ids.length }),
                )
              : null,
            " ",
            ids.length > 1
              ? board.h(
                  "a",
                  { href: board.address("compare", "", { ids: ids.join("\n") }) },
                  board.word("compareThem", { n: ids.length }),
                )
              : null,
          );
        };
        let names = "";
        const table = board.table({
          caption: board.word("jobs"),
          columns: [],
          rowAttributes: (row) => ({ "data-run": row.id, "data-state": row.state }),
        });
        panel.append(checked, table.element);
        drawChecked();
        return board.watchRuns(() => {
          const columns = known();
          if (columns.map((column) => column.key).join() !== names) {
            names = columns.map((column) => column.key).join();
            table.setColumns(columns);
          }
          table.update(rows());
        });
      };
      const draw = () => {
        title.textContent = board.line(info.name);
        const live = board.store.sweeps.find((sweep) => sweep.id === id);
        if (board.sweepActions && live && JSON.stringify(live.count) !== counted) {
          counted = JSON.stringify(live.count);
          board.refill(actions, board.sweepActions(live));
        }
        const fact = (name, text) =>
          text ? board.h("span", {}, board.h("span", { class: "faint" }, `${name} `), board.line(text)) : null;
        board.fill(
          head,
          board.h(
            "div",
            { class: "bar small" },
            live ? board.h("span", {}, board.counts(live.count)) : null,
            fact(
              board.word("objective"),
              info.pareto
                ? info.pareto.objectives.map((each) => each.key).join(", ")
                : [info.objective || []].flat().join(", "),
            ),
            fact(board.word("variedKeys"), (info.knobs || []).map((knob) => knob.title || knob).join(", ")),
            fact(board.word("column.eta"), board.duration(live?.eta)),
          ),
          info.command
            ? board.h(
                "details",
                { class: "small" },
                board.h("summary", {}, board.word("command")),
                board.copyButton(() => info.command),
                board.h("pre", { tabindex: "0" }, board.visible(info.command)),
              )
            : null,
        );
        board.fill(
          results,
          info.pending ? board.h("p", { class: "faint small", role: "status" }, board.word("pending")) : null,
          leaderboard(info),
          info.leaderboard.rows.length ? board.h("p", { class: "faint small" }, board.word("intervalHelp")) : null,
          (info.notes || []).map((note) => board.h("p", { class: "small" }, board.visible(note))),
          info.export
            ? board.h(
                "div",
                {},
                board.h(
                  "div",
                  { class: "bar" },
                  board.h("h2", { class: "minor" }, board.word("exportBest")),
                  board.copyButton(() => info.export),
                ),
                board.h("pre", { tabindex: "0" }, board.visible(info.export)),
              )
            : null,
          info.pareto ? pareto(info) : null,
        );
        const evidence = [info.race || []].flat();
        board.fill(
          decisions,
          evidence.length || info.search ? null : board.h("p", { class: "faint" }, board.word("noDecisions")),
          [...evidence, ...[info.search || []].flat()].map((rung) =>
            board.h(
              "section",
              {},
              board.h("h2", { class: "minor" }, board.visible(rung.title)),
              (rung.sentences || []).map((text) => board.h("p", {}, board.visible(text))),
              rung.rows?.length ? board.plainTable(board.line(rung.title), rung.header, rung.rows) : null,
            ),
          ),
        );
      };
      const put = (node) => (panel) => void panel.append(node);
      const drawTabs = () => {
        const all = [
          { name: "leaderboard", fill: put(results) },
          { name: "jobs", fill: jobs },
          { name: "lines", fill: embedded(board.curvePanel) },
          { name: "scatter", fill: embedded(board.scatterPanel) },
          { name: "parallel", fill: embedded(board.parallelPanel) },
          ...(info.race || info.search ? [{ name: "decisions", fill: put(decisions) }] : []),
          { name: "report", fill: (panel) => void panel.append(board.reportFrame(id, info)) },
        ];
        const titled = all.map((tab) => ({
          ...tab,
          title: board.word(
            ["lines", "scatter", "parallel"].includes(tab.name)
              ? `kind.${tab.name}`
              : tab.name === "report"
                ? "tab.report"
                : tab.name,
          ),
        }));
        tabs = board.tabs(titled, parameters.tab || "leaderboard", board.line(info.name), (tab) =>
          change({ tab: tab === "leaderboard" ? undefined : tab }),
        );
        board.fill(place, tabs.element);
      };
      // one question at a time; what has changed meanwhile is asked for after its answer
      const load = async () => {
        clearTimeout(timer);
        isStale = isLoading;
        if (isLoading) return;
        isLoading = true;
        const began = Date.now();
        try {
          const found = await board.get("sweep", { id });
          if (isClosed) return;
          info = found;
          draw();
          if (!tabs) drawTabs();
        } catch (error) {
          if (isClosed) return;
          board.failed(info ? head : place, error);
        }
        isLoading = false;
        if ((isStale || info?.pending) && !window.glmtunerStatic)
          timer = setTimeout(load, Math.max(1000, 3 * (Date.now() - began)));
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
        board.h("div", { class: "bar" }, title, actions),
        head,
        place,
      );
      load();
      let last = null;
      const stop = board.watchRuns((changed) => {
        const own = rows();
        const now = JSON.stringify(own.map((row) => [row.id, row.state, row.metrics]));
        if (last !== null && now !== last) load();
        else if (info && changed.length) draw();
        last = now;
      });
      return () => {
        isClosed = true;
        stop();
        clearTimeout(timer);
        if (tabs) tabs.stop();
      };
    },
  };
}
