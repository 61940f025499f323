"use strict";
{
  // A metric against a knob or another metric, with the Pareto front.
  const { WIDTH, label, picture, linkTo, axisValues, axisName, axes, select, objectiveOf } = board.plots;

  // One point a run. points: [{ id, name, x, y, xInterval, yInterval, colour }]; `front`: ids in its order along
  // x, or null.
  const scatter = ({ points, xTitle, yTitle, isXLog, isYLog, front, isLessX }) => {
    const height = 420;
    const [left, right, top, bottom] = [78, 20, 16, 52];
    const bounds = (axis) => points.flatMap((point) => [point[axis], ...(point[`${axis}Interval`] || [])]);
    const [x, y] = [board.scaleOf(bounds("x"), isXLog), board.scaleOf(bounds("y"), isYLog)];
    const px = (value) => left + x.place(value) * (WIDTH - left - right);
    const py = (value) => height - bottom - y.place(value) * (height - top - bottom);
    const bar = (x1, y1, x2, y2, colour) =>
      board.svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 1.2, opacity: 0.7 });
    const steps = (front || [])
      .map((id) => points.find((point) => point.id === id))
      .filter(Boolean)
      .sort((a, b) => px(a.x) - px(b.x));
    const path = steps
      .map((point, index) => {
        if (!index) return `M${px(point.x)} ${py(point.y)}`;
        // between two points of the front nothing better than the worse of both was measured
        return isLessX ? `H${px(point.x)}V${py(point.y)}` : `V${py(point.y)}H${px(point.x)}`;
      })
      .join("");
    const isOn = new Set(front || []);
    return board.svg(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${height}`,
        class: "plot",
        role: "img",
        "aria-label": board.word("plotOf", { y: yTitle, x: xTitle, n: points.length }),
        "data-chart": `${yTitle} / ${xTitle}`,
      },
      x.ticks.map(({ at, text }) => [
        board.svg("line", {
          x1: left + at * (WIDTH - left - right),
          x2: left + at * (WIDTH - left - right),
          y1: top,
          y2: height - bottom,
          class: "grid",
        }),
        label(left + at * (WIDTH - left - right), height - bottom + 18, text, { "text-anchor": "middle" }),
      ]),
      y.ticks.map(({ at, text }) => [
        board.svg("line", {
          x1: left,
          x2: WIDTH - right,
          y1: height - bottom - at * (height - top - bottom),
          y2: height - bottom - at * (height - top - bottom),
          class: "grid",
        }),
        label(left - 8, height - bottom - at * (height - top - bottom) + 4, text, { "text-anchor": "end" }),
      ]),
      label((left + WIDTH - right) / 2, height - 8, xTitle + (x.isLog ? ` (${board.word("logShort")})` : ""), {
        "text-anchor": "middle",
        class: "title",
      }),
      label(14, (top + height - bottom) / 2, yTitle + (y.isLog ? ` (${board.word("logShort")})` : ""), {
        "text-anchor": "middle",
        class: "title",
        transform: `rotate(-90 14 ${(top + height - bottom) / 2})`,
      }),
      path
        ? board.svg("path", {
            d: path,
            fill: "none",
            stroke: "currentColor",
            "stroke-width": 1.5,
            "stroke-dasharray": "4 3",
          })
        : null,
      points.map((point) => [
        point.yInterval
          ? bar(px(point.x), py(point.yInterval[0]), px(point.x), py(point.yInterval[1]), point.colour)
          : null,
        point.xInterval
          ? bar(px(point.xInterval[0]), py(point.y), px(point.xInterval[1]), py(point.y), point.colour)
          : null,
        board.svg(
          "circle",
          {
            cx: px(point.x),
            cy: py(point.y),
            r: isOn.has(point.id) ? 7 : 5,
            fill: point.colour,
            stroke: isOn.has(point.id) ? "currentColor" : "none",
            "stroke-width": 2,
            class: "point",
            "data-point": point.id,
            onclick: () => board.go("run", point.id),
          },
          board.svg(
            "title",
            {},
            `${board.line(point.name)}\n${xTitle}: ${board.value(point.x)}\n${yTitle}: ${board.score(point.y, point.yInterval)}`,
          ),
        ),
      ]),
    );
  };
  // The ids on the front: no other is better in one and at least equal in the other.
  board.front = (points, isLessX, isLessY) => {
    const cost = (point) => [isLessX ? point.x : -point.x, isLessY ? point.y : -point.y];
    return points
      .filter((point) => {
        const [a, b] = cost(point);
        return !points.some((other) => {
          const [c, d] = cost(other);
          return c <= a && d <= b && (c < a || d < b);
        });
      })
      .map((point) => point.id);
  };

  board.scatterPanel = ({ runs, parameters = {}, onchange = () => {} }) => {
    const state = {
      across: parameters.across || null,
      up: parameters.up || null,
      front: parameters.front === "true",
      log: parameters.log === "true",
    };
    const controls = board.h("div", { class: "bar" });
    const place = board.h("div");
    let last = "";
    const set = (more) => {
      Object.assign(state, more);
      onchange({ across: state.across, up: state.up, front: state.front || undefined, log: state.log || undefined });
      last = "";
      update();
    };
    const update = async () => {
      try {
        const rows = runs();
        const found = await axes(rows);
        const results = objectiveOf(rows, found.results);
        const up = state.up || results[0];
        const across =
          state.across ||
          found.varied[0] ||
          found.others.find((key) => key.endsWith("learning_rate")) ||
          found.results[1];
        if (!up || !across) return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
        const groups = [
          [board.word("variedKeys"), found.varied],
          [board.word("metrics"), [...found.results, ...found.measured]],
          [board.word("allKeys"), found.others],
        ];
        const [xs, ys] = [await axisValues(across, rows), await axisValues(up, rows)];
        const now = JSON.stringify([across, up, state.front, state.log, xs, ys, rows.length]);
        if (now === last) return;
        last = now;
        if (!controls.contains(document.activeElement)) {
          board.fill(
            controls,
            board.h(
              "label",
              {},
              board.word("up"),
              " ",
              select("scatter-y", up, groups.slice(1, 2), (name) => set({ up: name })),
            ),
            board.h(
              "label",
              {},
              board.word("across"),
              " ",
              select("scatter-x", across, groups, (name) => set({ across: name })),
            ),
            board.h(
              "label",
              {},
              board.h("input", {
                type: "checkbox",
                id: "scatter-log",
                checked: state.log,
                onchange: (event) => set({ log: event.target.checked }),
              }),
              " ",
              board.word("logScale"),
            ),
            board.h(
              "label",
              {},
              board.h("input", {
                type: "checkbox",
                id: "front",
                checked: state.front,
                onchange: (event) => set({ front: event.target.checked }),
              }),
              " ",
              board.word("paretoFront"),
            ),
          );
        }
        const colours = board.colours(rows.map((row) => row.id));
        const interval = (row, name) => (name.startsWith("metric:") ? row.intervals?.[name.slice(7)] : null) || null;
        const labels = board.labels(rows);
        const points = rows
          .filter((row) => row.id in xs && typeof ys[row.id] === "number" && Number.isFinite(ys[row.id]))
          .map((row) => ({
            id: row.id,
            name: labels.get(row.id),
            x: xs[row.id],
            y: ys[row.id],
            xInterval: interval(row, across),
            yInterval: interval(row, up),
            colour: colours.get(row.id).colour,
          }));
        if (!points.length) return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
        const left = rows.length - points.length;
        const isNumeric = points.every((point) => typeof point.x === "number");
        const [isLessX, isLessY] = [board.isLessBetter(axisName(across)), board.isLessBetter(axisName(up))];
        const front = state.front && isNumeric ? board.front(points, isLessX, isLessY) : null;
        const svg = scatter({
          points,
          xTitle: axisName(across),
          yTitle: axisName(up),
          isXLog: null,
          isYLog: state.log,
          front,
          isLessX,
        });
        const direction = (isLess) => board.word(isLess ? "lessIsBetter" : "moreIsBetter");
        board.fill(
          place,
          picture(
            `${axisName(up)} · ${axisName(across)}`,
            svg,
            [board.word("run"), axisName(across), axisName(up), ...(front ? [board.word("paretoFront")] : [])],
            points.map((point) => [
              point.id,
              board.value(point.x),
              board.score(point.y, point.yInterval),
              ...(front ? [front.includes(point.id) ? "✓" : ""] : []),
            ]),
            linkTo,
          ),
          front
            ? board.h(
                "p",
                { class: "small" },
                board.word("frontSays", {
                  n: front.length,
                  all: points.length,
                  x: axisName(across),
                  xWay: direction(isLessX),
                  y: axisName(up),
                  yWay: direction(isLessY),
                }),
              )
            : null,
          left ? board.h("p", { class: "faint small" }, board.word("leftOut", { n: left })) : null,
        );
      } catch (error) {
        board.failed(place, error);
      }
    };
    const stop = board.watchRuns(update);
    return { element: board.h("div", {}, controls, place), update, close: stop };
  };
  // the front of a sweep with two objectives, as its report has it: { objectives, titles, better: [low | high],
  // best: [ids], points: [{ id, label, values }] }
  board.frontPicture = ({ objectives: [first, second], titles: [yTitle, xTitle], better, best, points: given }) => {
    const points = given.map((point) => {
      const intervals = board.store.rows.get(point.id)?.intervals || {};
      return {
        id: point.id,
        name: point.label,
        x: point.values[second],
        y: point.values[first],
        xInterval: intervals[second] || null,
        yInterval: intervals[first] || null,
        colour: board.colour(best.includes(point.id) ? "--accent" : "--faint"),
      };
    });
    const svg = scatter({
      points,
      xTitle,
      yTitle,
      isXLog: null,
      isYLog: false,
      front: best,
      isLessX: better[1] === "low",
    });
    return picture(
      board.word("paretoFront"),
      svg,
      [board.word("run"), xTitle, yTitle, board.word("paretoFront")],
      points.map((point) => [
        point.id,
        board.value(point.x),
        board.score(point.y, point.yInterval),
        best.includes(point.id) ? "✓" : "",
      ]),
      linkTo,
    );
  };
}
