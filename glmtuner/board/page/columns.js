"use strict";
{
  // The columns of tables of runs, and how a run's state is shown.
  const states = [
    "running",
    "queued",
    "paused",
    "finished",
    "failed",
    "out of memory",
    "diverged",
    "interrupted",
    "dropped",
    "not started",
  ];
  const symbols = {
    running: "●",
    queued: "◌",
    paused: "‖",
    finished: "✓",
    failed: "✕",
    "out of memory": "✕",
    diverged: "↯",
    interrupted: "◼",
    dropped: "↓",
    "not started": "○",
  };
  board.chip = (row) => [
    board.h(
      "span",
      { class: `chip ${states.includes(row.state) ? row.state.replaceAll(" ", "-") : ""}` },
      board.h("span", { "aria-hidden": "true" }, `${symbols[row.state] || "•"} `),
      board.maybe("state", row.state),
    ),
    row.mark
      ? board.h(
          "span",
          { class: `mark ${row.mark.split(" ")[0]}` },
          board.h("span", { "aria-hidden": "true" }, "⚠ "),
          board.maybe("mark", row.mark),
        )
      : null,
  ];
  board.runLink = (row, text = board.line(row.name)) =>
    board.h("a", { href: board.address("run", row.id), title: board.line(row.id) }, text);
  const progress = (row) => {
    if (row.step === null || row.step === undefined) return "";
    const bar = row.steps
      ? board.h("progress", { max: String(row.steps), value: row.step, "aria-label": board.word("column.step") })
      : null;
    return [bar, `${row.step.toLocaleString("en-US")}${row.steps ? ` / ${row.steps.toLocaleString("en-US")}` : ""}`];
  };
  const varied = (row) =>
    Object.entries(row.varied || {})
      .map(([key, value]) => `${key.split(".").pop()}=${board.value(value)}`)
      .join(", ");

  // The columns of runs: those that every run has, the metrics, and any configuration key. `onpin` and `oncheck`
  // are told of clicks.
  board.runColumns = ({ rows, pins, onpin, oncheck, extra = {} }) => {
    const text = (key, valueOf, more = {}) => ({
      key,
      title: board.word(`column.${key}`),
      text: (row) => board.line(valueOf(row) ?? ""),
      sort: (row) => valueOf(row),
      ...more,
    });
    const number = (key, valueOf, more = {}) => ({
      key,
      title: board.word(`column.${key}`),
      text: (row) => board.number(valueOf(row)),
      sort: valueOf,
      value: valueOf,
      isNumber: true,
      ...more,
    });
    const box = (row) =>
      board.h("input", {
        type: "checkbox",
        checked: board.checked.has(row.id),
        "aria-label": board.word("check", { name: board.line(row.name) }),
        onchange: (event) => {
          board.toggle(board.checked, row.id, event.target.checked);
          oncheck();
        },
      });
    const pin = (row) =>
      board.h(
        "button",
        {
          type: "button",
          class: "pin",
          "aria-pressed": String(pins.has(row.id)),
          "aria-label": board.word("pin", { name: board.line(row.name) }),
          title: board.word("pin", { name: board.line(row.name) }),
          onclick: () => onpin(row.id),
        },
        pins.has(row.id) ? "★" : "☆",
      );
    const columns = [
      {
        key: "check",
        title: "",
        text: (row) => String(board.checked.has(row.id)),
        plain: () => "",
        make: (row) => [box(row), pins && onpin ? pin(row) : null],
        className: "narrow",
        isFixed: true,
        head: () => board.h("span", { class: "hidden" }, board.word("selection")),
      },
      {
        key: "name",
        title: board.word("column.name"),
        text: (row) => [row.name, row.sweep, row.sweep ? varied(row) : ""].join("|"),
        plain: (row) => row.name,
        make: (row) => [
          board.runLink(row, board.labels([row]).get(row.id)),
          row.sweep
            ? board.h(
                "a",
                { class: "faint small block", href: board.address("sweep", row.sweep) },
                board.line(row.sweep),
              )
            : null,
        ],
        sort: (row) => row.name,
        first: true,
        isRowHeader: true,
        isFixed: true,
      },
      {
        key: "state",
        title: board.word("column.state"),
        text: (row) => [row.state, row.mark, row.note].join("|"),
        plain: (row) => [row.state, row.mark, row.note].filter(Boolean).join("; "),
        make: (row) => [
          board.chip(row),
          row.note ? board.h("span", { class: "note", title: board.line(row.note) }, board.short(row.note, 60)) : null,
        ],
        sort: (row) => states.indexOf(row.state),
      },
      { ...number("step", (row) => row.step), text: (row) => `${row.step ?? ""}/${row.steps ?? ""}`, make: progress },
      number("epoch", (row) => row.epoch),
      number("loss", (row) => row.loss),
      ...board.metricsOf(rows).map((name) => ({
        key: `metric:${name}`,
        title: name,
        className: "metric",
        isNumber: true,
        isCost: board.isCost(name),
        value: (row) => row.metrics?.[name],
        sort: (row) => row.metrics?.[name],
        text: (row) => board.measured(name, row.metrics?.[name], row.intervals?.[name]),
      })),
      text("varied", varied, { className: "wide" }),
      text("stage", (row) => row.stage),
      text("model", (row) => row.model),
      text("method", (row) => row.method),
      text("quant", (row) => row.quant),
      text("data", (row) => row.data, { className: "wide" }),
      number("speed", (row) => row.tokens_per_second),
      number("memory", (row) => row.memory_gib),
      {
        key: "eta",
        title: board.word("column.eta"),
        text: (row) => (row.state === "running" ? board.duration(row.eta_s) : ""),
        sort: (row) => row.eta_s,
        isNumber: true,
      },
      {
        key: "age",
        title: board.word("column.age"),
        help: board.word("ageHelp"),
        text: (row) => (row.started ? board.duration(board.now() - row.started) : ""),
        sort: (row) => (row.started ? -row.started : null),
        isNumber: true,
      },
      {
        key: "updated",
        title: board.word("column.updated"),
        text: (row) => (row.updated ? board.date(row.updated) : ""),
        sort: (row) => row.updated,
      },
      ...Object.entries(extra).map(([key, values]) => ({
        key: `key:${key}`,
        title: key,
        className: "wide",
        text: (row) => (row.id in values ? board.line(board.value(values[row.id])) : ""),
        sort: (row) => values[row.id],
        value: (row) => (typeof values[row.id] === "number" ? values[row.id] : undefined),
      })),
    ];
    return columns;
  };
  const usual = [
    "state",
    "stage",
    "model",
    "method",
    "data",
    "varied",
    "step",
    "loss",
    "speed",
    "memory",
    "eta",
    "age",
  ];
  // the columns that are seen: those chosen, else the usual ones that any row has a value for, and the first
  // four results
  board.shownColumns = (columns, chosen, rows) => {
    const results = columns
      .filter((column) => column.key.startsWith("metric:") && !column.isCost)
      .slice(0, 4)
      .map((column) => column.key);
    const isShown = (column) =>
      column.isFixed ||
      (chosen
        ? chosen.includes(column.key)
        : column.key.startsWith("key:") ||
          results.includes(column.key) ||
          (usual.includes(column.key) && rows.some((row) => column.text(row).replace(/^[|/]+$/, ""))));
    return columns.filter(isShown);
  };
  // how many jobs are in each state, as a bar and in words
  board.counts = (count) => {
    const parts = [...states, ...Object.keys(count || {})].filter(
      (state, place, all) => count?.[state] && all.indexOf(state) === place,
    );
    const total = parts.reduce((sum, state) => sum + count[state], 0);
    const bar = board.h(
      "span",
      { class: "counts", "aria-hidden": "true" },
      parts.map((state) => {
        const part = board.h("span", { class: `part ${state.replaceAll(" ", "-")}` });
        part.style.width = `${(100 * count[state]) / total}%`;
        return part;
      }),
    );
    return [
      bar,
      board.h(
        "span",
        { class: "small" },
        parts.map((state) => `${count[state]} ${board.maybe("state", state)}`).join(", "),
      ),
    ];
  };
}
