"use strict";
{
  // Parallel coordinates: a line a run, an axis a knob or a metric; axes filter.
  const { WIDTH, label, picture, linkTo, axisValues, axisName, axes, objectiveOf } = board.plots;

  board.parallelPanel = ({ runs, parameters = {}, onchange = () => {} }) => {
    const height = 360;
    const state = { axes: parameters.axes ? parameters.axes.split("\n") : null };
    const ranges = new Map(); // axis -> [low, high] as shares of the axis
    const picker = board.h("div", { class: "menu card" });
    const limits = board.h("div", { class: "limits" });
    const place = board.h("div");
    const found = board.h("div");
    let known = null;
    let lines = [];
    let last = "";
    const pass = (row) =>
      [...ranges].every(([name, [low, high]]) => {
        const axis = known.axes.find((each) => each.name === name);
        if (!axis || !(row.id in axis.values)) return false;
        const at = axis.scale.place(axis.values[row.id]);
        return at >= low - 1e-9 && at <= high + 1e-9;
      });
    const paint = () => {
      const passing = known.rows.filter(pass);
      const ids = new Set(passing.map((row) => row.id));
      for (const { id, element } of lines) element.setAttribute("class", ids.has(id) ? "line" : "line out");
      for (const axis of known.axes) {
        const range = ranges.get(axis.name);
        axis.brush.setAttribute("visibility", range ? "visible" : "hidden");
        if (!range) continue;
        axis.brush.setAttribute("y", axis.top(range[1]));
        axis.brush.setAttribute("height", Math.max(2, axis.top(range[0]) - axis.top(range[1])));
      }
      board.fill(
        found,
        board.h(
          "p",
          { role: "status" },
          board.word("passing", { n: passing.length, all: known.rows.length }),
          " ",
          passing.length
            ? board.h(
                "a",
                { href: board.address("curves", "", { ids: passing.map((row) => row.id).join("\n") }) },
                board.word("theirCurves"),
              )
            : null,
          " ",
          ranges.size
            ? board.h(
                "button",
                {
                  type: "button",
                  class: "small",
                  onclick: () => {
                    ranges.clear();
                    drawLimits();
                    paint();
                  },
                },
                board.word("allAgain"),
              )
            : null,
        ),
        passing.length && passing.length <= 20
          ? board.h(
              "ul",
              { class: "small" },
              passing.map((row) => board.h("li", {}, board.runLink(row))),
            )
          : null,
      );
    };
    // what brushing with a pointer does, for the keyboard
    const drawLimits = () =>
      board.fill(
        limits,
        known.axes.map((axis) => {
          const title = axisName(axis.name);
          if (axis.scale.names) {
            const range = ranges.get(axis.name);
            const only =
              range &&
              axis.scale.names.filter(
                (name) => axis.scale.place(name) >= range[0] && axis.scale.place(name) <= range[1],
              );
            return board.h(
              "label",
              {},
              `${title} `,
              board.h(
                "select",
                {
                  onchange: (event) => {
                    const at = event.target.value === "" ? null : axis.scale.place(event.target.value);
                    if (at === null) ranges.delete(axis.name);
                    else ranges.set(axis.name, [at - 0.01, at + 0.01]);
                    paint();
                  },
                },
                board.h("option", { value: "" }, board.word("any")),
                axis.scale.names.map((name) =>
                  board.h(
                    "option",
                    { value: name, selected: only?.length === 1 && only[0] === name },
                    board.short(name, 40),
                  ),
                ),
              ),
            );
          }
          const range = ranges.get(axis.name);
          const input = (side) =>
            board.h("input", {
              type: "number",
              step: "any",
              "aria-label": board.word(side ? "atMost" : "atLeast", { key: title }),
              value: range ? Number(axis.scale.value(range[side]).toPrecision(4)) : "",
              onchange: (event) => {
                const next = [...(ranges.get(axis.name) || [0, 1])];
                next[side] = event.target.value === "" ? side : axis.scale.place(Number(event.target.value));
                if (Number.isNaN(next[side])) next[side] = side;
                ranges.set(axis.name, next);
                paint();
              },
            });
          return board.h("span", { class: "range" }, `${title} `, input(0), " … ", input(1));
        }),
      );
    const update = async () => {
      try {
        const rows = runs();
        const all = await axes(rows);
        const objectives = objectiveOf(rows, all.results);
        const names = state.axes || [...all.varied.slice(0, 6), ...objectives.slice(0, 2)];
        if (!names.length || !rows.length)
          return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
        const columns = await Promise.all(names.map(async (name) => ({ name, values: await axisValues(name, rows) })));
        const now = JSON.stringify([columns, rows.length]);
        if (now === last) return;
        last = now;
        const width = Math.max(WIDTH, names.length * 120);
        const [top, bottom] = [44, 24];
        const left = (index) => (names.length < 2 ? width / 2 : 70 + (index * (width - 140)) / (names.length - 1));
        known = { rows: rows.filter((row) => columns.every((axis) => row.id in axis.values)), axes: [] };
        const missing = rows.length - known.rows.length;
        known.axes = columns.map((axis) => ({
          ...axis,
          scale: board.scaleOf(
            known.rows.map((row) => axis.values[row.id]),
            axis.name.startsWith("metric:") ? false : null,
          ),
          top: (at) => top + (1 - at) * (height - top - bottom),
        }));
        const final = known.axes[known.axes.length - 1];
        lines = known.rows.map((row) => {
          const path = known.axes
            .map(
              (axis, index) => `${index ? "L" : "M"}${left(index)} ${axis.top(axis.scale.place(axis.values[row.id]))}`,
            )
            .join("");
          const share = Math.round(100 * final.scale.place(final.values[row.id]));
          const element = board.svg(
            "path",
            {
              d: path,
              fill: "none",
              class: "line",
              stroke: `color-mix(in oklab, #f8631b ${share}%, #3f7de0)`,
              "stroke-width": 2,
              onclick: () => board.go("run", row.id),
            },
            board.svg(
              "title",
              {},
              `${board.line(row.name)}\n${known.axes.map((axis) => `${axisName(axis.name)}: ${board.value(axis.values[row.id])}`).join("\n")}`,
            ),
          );
          return { id: row.id, element };
        });
        const svg = board.svg(
          "svg",
          {
            viewBox: `0 0 ${width} ${height}`,
            class: "plot parallel",
            role: "img",
            "data-chart": "parallel",
            "aria-label": board.word("parallelOf", { n: known.rows.length, axes: names.map(axisName).join(", ") }),
          },
          lines.map((line) => line.element),
          known.axes.map((axis, index) => {
            axis.brush = board.svg("rect", {
              x: left(index) - 9,
              width: 18,
              y: top,
              height: 10,
              class: "brush",
              visibility: "hidden",
            });
            const hit = board.svg("rect", {
              x: left(index) - 22,
              width: 44,
              y: top,
              height: height - top - bottom,
              fill: "transparent",
              class: "hit",
              "data-axis": axis.name,
            });
            const share = (event) => {
              const box = svg.getBoundingClientRect();
              const y = ((event.clientY - box.top) / box.height) * height;
              return Math.max(0, Math.min(1, 1 - (y - top) / (height - top - bottom)));
            };
            hit.addEventListener("pointerdown", (event) => {
              const from = share(event);
              hit.setPointerCapture(event.pointerId);
              const move = (next) => {
                const to = share(next);
                ranges.set(axis.name, [Math.min(from, to), Math.max(from, to)]);
                paint();
              };
              hit.addEventListener("pointermove", move);
              hit.addEventListener(
                "pointerup",
                (next) => {
                  hit.removeEventListener("pointermove", move);
                  if (Math.abs(share(next) - from) < 0.01) ranges.delete(axis.name);
                  drawLimits();
                  paint();
                },
                { once: true },
              );
            });
            return [
              board.svg("line", { x1: left(index), x2: left(index), y1: top, y2: height - bottom, class: "axis" }),
              axis.brush,
              axis.scale.ticks.map(({ at, text }) =>
                label(left(index) + 6, axis.top(at) + 4, text, { class: "tick halo" }),
              ),
              label(
                left(index),
                index % 2 ? 32 : 16,
                board.short(axisName(axis.name).split(".").pop(), 22) +
                  (axis.scale.isLog ? ` (${board.word("logShort")})` : ""),
                { "text-anchor": "middle", class: "title" },
              ),
              hit,
            ];
          }),
        );
        const header = [board.word("run"), ...names.map(axisName)];
        board.fill(
          place,
          known.rows.length
            ? [
                picture(
                  board.word("kind.parallel"),
                  svg,
                  header,
                  known.rows.map((row) => [row.id, ...known.axes.map((axis) => board.value(axis.values[row.id]))]),
                  linkTo,
                ),
                board.h("p", { class: "faint small" }, board.word("parallelHelp", { name: axisName(final.name) })),
              ]
            : board.h("p", { class: "faint" }, board.word("noResults")),
          missing ? board.h("p", { class: "faint small" }, board.word("leftOut", { n: missing })) : null,
        );
        if (!picker.contains(document.activeElement)) {
          board.fill(
            picker,
            [...new Set([...names, ...all.varied, ...all.results, ...all.others])].slice(0, 150).map((name) =>
              board.h(
                "label",
                {},
                board.h("input", {
                  type: "checkbox",
                  checked: names.includes(name),
                  onchange: (event) => {
                    state.axes = event.target.checked
                      ? [...(state.axes || names), name]
                      : (state.axes || names).filter((each) => each !== name);
                    ranges.delete(name);
                    onchange({ axes: state.axes.join("\n") });
                    last = "";
                    update();
                  },
                }),
                " ",
                axisName(name),
              ),
            ),
          );
        }
        if (!limits.contains(document.activeElement)) drawLimits();
        paint();
      } catch (error) {
        board.failed(place, error);
      }
    };
    const stop = board.watchRuns(update);
    return {
      element: board.h(
        "div",
        {},
        board.h(
          "div",
          { class: "bar" },
          board.h("details", { class: "chooser" }, board.h("summary", {}, board.word("axes")), picker),
          board.h("details", { class: "help" }, board.h("summary", {}, board.word("limits")), limits),
        ),
        place,
        found,
      ),
      update,
      close: stop,
    };
  };
}
