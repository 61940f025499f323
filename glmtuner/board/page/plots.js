"use strict";
{
  // What the plots share: scales, axes, tables, downloads. They are SVG, of the page's own elements.

  // The scale of an axis over the values: { place(value) in 0 … 1, ticks: [{ at, text }], isLog, names }. Texts
  // are positions by their order.
  board.scaleOf = (values, isLog = null) => {
    const present = values.filter((value) => value !== null && value !== undefined);
    const isNumeric =
      present.length > 0 && present.every((value) => typeof value === "number" && Number.isFinite(value));
    if (!isNumeric) {
      const names = [...new Set(present.map(board.value))].sort((a, b) =>
        a.localeCompare(b, undefined, { numeric: true }),
      );
      const at = (value) =>
        names.length < 2 ? 0.5 : 0.06 + (0.88 * names.indexOf(board.value(value))) / (names.length - 1);
      return {
        place: at,
        ticks: names.map((name) => ({ at: at(name), text: board.short(name, 18) })),
        isLog: false,
        names,
      };
    }
    const [low, high] = [Math.min(...present), Math.max(...present)];
    const takesLog = low > 0 && (isLog === null ? high / low >= 10 && new Set(present).size > 1 : isLog);
    const of = takesLog ? Math.log10 : (value) => value;
    const margin = (of(high) - of(low)) * 0.06 || Math.abs(of(high)) * 0.1 || 1;
    const [from, to] = [of(low) - margin, of(high) + margin];
    const at = (value) => (of(value) - from) / (to - from);
    const ticks = [];
    if (takesLog) {
      const factors = to - from > 4 ? [1] : to - from > 1.5 ? [1, 3] : [1, 2, 5];
      const stride = Math.max(1, Math.ceil((to - from) / 6));
      for (let power = Math.floor(from); power <= to; power += stride)
        for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(3)));
    } else {
      const rough = (to - from) / 5;
      const unit = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each >= rough);
      for (let value = Math.ceil(from / step) * step; value <= to; value += step)
        ticks.push(Number(value.toPrecision(12)));
    }
    const inside = ticks
      .map((value) => ({ at: at(value), text: board.tick(value) }))
      .filter((tick) => tick.at >= 0 && tick.at <= 1);
    return {
      place: at,
      ticks: inside,
      isLog: takesLog,
      names: null,
      value: (share) => (takesLog ? 10 ** (from + share * (to - from)) : from + share * (to - from)),
    };
  };
  const label = (x, y, text, more = {}) =>
    board.svg("text", { x, y, fill: "currentColor", class: "tick", ...more }, text);

  const savePicture = (svg, name) => {
    // a picture outside the page has none of its style: the texts, the grid and the page's colours are written into it
    const copy = svg.cloneNode(true);
    const { width, height } = svg.viewBox.baseVal;
    copy.setAttribute("width", width * 2);
    copy.setAttribute("height", height * 2);
    copy.setAttribute("color", board.colour("--ink"));
    copy.setAttribute("font-family", "system-ui, sans-serif");
    copy.setAttribute("font-size", "12");
    for (const line of copy.querySelectorAll(".grid")) line.setAttribute("stroke", board.colour("--line"));
    copy.prepend(board.svg("rect", { width, height, fill: board.colour("--card") }));
    const image = new Image();
    image.onload = () => {
      const canvas = board.h("canvas", { width: width * 2, height: height * 2 });
      canvas.getContext("2d").drawImage(image, 0, 0);
      canvas.toBlob((blob) => board.download(`${name}.png`, "image/png", blob));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  };
  const picture = (title, svg, header, rows, link) =>
    board.h(
      "figure",
      { class: "card" },
      board.h(
        "figcaption",
        {},
        board.h("strong", {}, title),
        board.h(
          "span",
          { class: "buttons" },
          board.h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": board.word("save", { kind: "PNG", title }),
              onclick: () => savePicture(svg, title),
            },
            "PNG",
          ),
          board.h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": board.word("save", { kind: "CSV", title }),
              onclick: () => board.download(`${title}.csv`, "text/csv", board.csv([header, ...rows])),
            },
            "CSV",
          ),
        ),
      ),
      board.h("div", { class: "plotbox", tabindex: "0", role: "group", "aria-label": title }, svg),
      board.h(
        "details",
        { class: "small" },
        board.h("summary", {}, board.word("asTable")),
        board.plainTable(
          title,
          header,
          rows.map(([id, ...row]) => [link(id), ...row]),
        ),
      ),
    );
  const linkTo = (id) => (board.store.rows.has(id) ? board.runLink(board.store.rows.get(id)) : board.line(id));

  // What can be on an axis: { name -> values by id }, of the metrics and of any configuration key.
  const axisValues = async (name, rows) => {
    if (name.startsWith("key:")) {
      const values = await board.valuesOf(name.slice(4));
      return Object.fromEntries(rows.filter((row) => row.id in values).map((row) => [row.id, values[row.id]]));
    }
    const field = { memory: "memory_gib", speed: "tokens_per_second" }[name];
    return Object.fromEntries(
      rows
        .map((row) => [row.id, field ? row[field] : row.metrics?.[name.slice(7)]])
        .filter(([, value]) => value !== null && value !== undefined),
    );
  };
  const axisName = (name) => (name.includes(":") ? name.slice(name.indexOf(":") + 1) : board.word(`column.${name}`));
  const axes = async (rows) => {
    const varied = board.knobsOf(rows);
    const others = (await board.keys()).filter((key) => !varied.includes(key));
    const results = board.metricsOf(rows).map((name) => `metric:${name}`);
    return {
      varied: varied.map((key) => `key:${key}`),
      results,
      others: others.map((key) => `key:${key}`),
      measured: ["speed", "memory"],
    };
  };
  const select = (id, chosen, groups, onchange) =>
    board.h(
      "select",
      { id, onchange: (event) => onchange(event.target.value) },
      groups
        .filter(([, names]) => names.length)
        .map(([title, names]) =>
          board.h(
            "optgroup",
            { label: title },
            names.map((name) => board.h("option", { value: name, selected: name === chosen }, axisName(name))),
          ),
        ),
    );
  const objectiveOf = (rows, results) => {
    const sweeps = board.store.sweeps.filter((sweep) => rows.some((row) => row.sweep === sweep.id));
    const asked = sweeps.flatMap((sweep) => sweep.objective || []);
    const find = (name) =>
      results.find(
        (each) => each === `metric:${name}` || each === `metric:predict_${name}` || each === `metric:eval_${name}`,
      );
    return [...new Set([...asked.map(find).filter(Boolean), ...results.filter((name) => !board.isCost(name))])];
  };
  board.plots = { WIDTH: 760, label, picture, linkTo, axisValues, axisName, axes, select, objectiveOf };
}
