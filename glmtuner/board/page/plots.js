"use strict";
{
// A metric against a knob or another metric with the Pareto front, and parallel coordinates, as SVG.
const WIDTH = 760;

// The scale of an axis over the values: { place(value) in 0 … 1, ticks: [{ at, text }], isLog, names }. Texts are positions by their order.
board.scaleOf = (values, isLog = null) => {
  const present = values.filter((value) => value !== null && value !== undefined);
  const isNumeric = present.length > 0 && present.every((value) => typeof value === "number" && Number.isFinite(value));
  if (!isNumeric) {
    const names = [...new Set(present.map(board.value))].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    const at = (value) => (names.length < 2 ? 0.5 : 0.06 + (0.88 * names.indexOf(board.value(value))) / (names.length - 1));
    return { place: at, ticks: names.map((name) => ({ at: at(name), text: board.short(name, 18) })), isLog: false, names };
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
    for (let power = Math.floor(from); power <= to; power += stride) for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(3)));
  } else {
    const rough = (to - from) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * unit).find((each) => each >= rough);
    for (let value = Math.ceil(from / step) * step; value <= to; value += step) ticks.push(Number(value.toPrecision(12)));
  }
  const inside = ticks.map((value) => ({ at: at(value), text: board.tick(value) })).filter((tick) => tick.at >= 0 && tick.at <= 1);
  return { place: at, ticks: inside, isLog: takesLog, names: null, value: (share) => (takesLog ? 10 ** (from + share * (to - from)) : from + share * (to - from)) };
};
const label = (x, y, text, more = {}) => board.svg("text", { x, y, fill: "currentColor", class: "tick", ...more }, text);

// One point a run. points: [{ id, name, x, y, xInterval, yInterval, colour }]; `front`: ids in its order along x, or null.
const scatter = ({ points, xTitle, yTitle, isXLog, isYLog, front, isLessX }) => {
  const height = 420;
  const [left, right, top, bottom] = [78, 20, 16, 52];
  const bounds = (axis) => points.flatMap((point) => [point[axis], ...(point[`${axis}Interval`] || [])]);
  const [x, y] = [board.scaleOf(bounds("x"), isXLog), board.scaleOf(bounds("y"), isYLog)];
  const px = (value) => left + x.place(value) * (WIDTH - left - right);
  const py = (value) => height - bottom - y.place(value) * (height - top - bottom);
  const bar = (x1, y1, x2, y2, colour) => board.svg("line", { x1, y1, x2, y2, stroke: colour, "stroke-width": 1.2, opacity: 0.7 });
  const steps = (front || []).map((id) => points.find((point) => point.id === id)).filter(Boolean).sort((a, b) => px(a.x) - px(b.x));
  const path = steps.map((point, index) => {
    if (!index) return `M${px(point.x)} ${py(point.y)}`;
    // between two points of the front nothing better than the worse of both was measured
    return isLessX ? `H${px(point.x)}V${py(point.y)}` : `V${py(point.y)}H${px(point.x)}`;
  }).join("");
  const isOn = new Set(front || []);
  return board.svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "plot", role: "img", "aria-label": board.word("plotOf", { y: yTitle, x: xTitle, n: points.length }), "data-chart": `${yTitle} / ${xTitle}` },
    x.ticks.map(({ at, text }) => [board.svg("line", { x1: left + at * (WIDTH - left - right), x2: left + at * (WIDTH - left - right), y1: top, y2: height - bottom, class: "grid" }), label(left + at * (WIDTH - left - right), height - bottom + 18, text, { "text-anchor": "middle" })]),
    y.ticks.map(({ at, text }) => [board.svg("line", { x1: left, x2: WIDTH - right, y1: height - bottom - at * (height - top - bottom), y2: height - bottom - at * (height - top - bottom), class: "grid" }), label(left - 8, height - bottom - at * (height - top - bottom) + 4, text, { "text-anchor": "end" })]),
    label((left + WIDTH - right) / 2, height - 8, xTitle + (x.isLog ? ` (${board.word("logShort")})` : ""), { "text-anchor": "middle", class: "title" }),
    label(14, (top + height - bottom) / 2, yTitle + (y.isLog ? ` (${board.word("logShort")})` : ""), { "text-anchor": "middle", class: "title", transform: `rotate(-90 14 ${(top + height - bottom) / 2})` }),
    path ? board.svg("path", { d: path, fill: "none", stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "4 3" }) : null,
    points.map((point) => [
      point.yInterval ? bar(px(point.x), py(point.yInterval[0]), px(point.x), py(point.yInterval[1]), point.colour) : null,
      point.xInterval ? bar(px(point.xInterval[0]), py(point.y), px(point.xInterval[1]), py(point.y), point.colour) : null,
      board.svg("circle", { cx: px(point.x), cy: py(point.y), r: isOn.has(point.id) ? 7 : 5, fill: point.colour, stroke: isOn.has(point.id) ? "currentColor" : "none", "stroke-width": 2, class: "point", "data-point": point.id, onclick: () => board.go("run", point.id) },
        board.svg("title", {}, `${board.line(point.name)}\n${xTitle}: ${board.value(point.x)}\n${yTitle}: ${board.score(point.y, point.yInterval)}`)),
    ]));
};
// The ids on the front: no other is better in one and at least equal in the other.
board.front = (points, isLessX, isLessY) => {
  const cost = (point) => [isLessX ? point.x : -point.x, isLessY ? point.y : -point.y];
  return points.filter((point) => {
    const [a, b] = cost(point);
    return !points.some((other) => {
      const [c, d] = cost(other);
      return c <= a && d <= b && (c < a || d < b);
    });
  }).map((point) => point.id);
};
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
const picture = (title, svg, header, rows, link) => board.h("figure", { class: "card" },
  board.h("figcaption", {}, board.h("strong", {}, title), board.h("span", { class: "buttons" },
    board.h("button", { type: "button", class: "small", "aria-label": board.word("save", { kind: "PNG", title }), onclick: () => savePicture(svg, title) }, "PNG"),
    board.h("button", { type: "button", class: "small", "aria-label": board.word("save", { kind: "CSV", title }), onclick: () => board.download(`${title}.csv`, "text/csv", board.csv([header, ...rows])) }, "CSV"))),
  board.h("div", { class: "plotbox", tabindex: "0", role: "group", "aria-label": title }, svg),
  board.h("details", { class: "small" }, board.h("summary", {}, board.word("asTable")), board.plainTable(title, header, rows.map(([id, ...row]) => [link(id), ...row]))));
const linkTo = (id) => (board.store.rows.has(id) ? board.runLink(board.store.rows.get(id)) : board.line(id));

// What can be on an axis: { name -> values by id }, of the metrics and of any configuration key.
const axisValues = async (name, rows) => {
  if (name.startsWith("key:")) {
    const values = await board.valuesOf(name.slice(4));
    return Object.fromEntries(rows.filter((row) => row.id in values).map((row) => [row.id, values[row.id]]));
  }
  const field = { memory: "memory_gib", speed: "tokens_per_second" }[name];
  return Object.fromEntries(rows.map((row) => [row.id, field ? row[field] : row.metrics?.[name.slice(7)]]).filter(([, value]) => value !== null && value !== undefined));
};
const axisName = (name) => (name.includes(":") ? name.slice(name.indexOf(":") + 1) : board.word(`column.${name}`));
const axes = async (rows) => {
  const varied = board.knobsOf(rows);
  const others = (await board.keys()).filter((key) => !varied.includes(key));
  const results = board.metricsOf(rows).map((name) => `metric:${name}`);
  return { varied: varied.map((key) => `key:${key}`), results, others: others.map((key) => `key:${key}`), measured: ["speed", "memory"] };
};
const select = (id, chosen, groups, onchange) => board.h("select", { id, onchange: (event) => onchange(event.target.value) },
  groups.filter(([, names]) => names.length).map(([title, names]) => board.h("optgroup", { label: title }, names.map((name) => board.h("option", { value: name, selected: name === chosen }, axisName(name))))));
const objectiveOf = (rows, results) => {
  const sweeps = board.store.sweeps.filter((sweep) => rows.some((row) => row.sweep === sweep.id));
  const asked = sweeps.flatMap((sweep) => sweep.objective || []);
  const find = (name) => results.find((each) => each === `metric:${name}` || each === `metric:predict_${name}` || each === `metric:eval_${name}`);
  return [...new Set([...asked.map(find).filter(Boolean), ...results.filter((name) => !board.isCost(name))])];
};

board.scatterPanel = ({ runs, parameters = {}, onchange = () => {} }) => {
  const state = { across: parameters.across || null, up: parameters.up || null, front: parameters.front === "true", log: parameters.log === "true" };
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
      const across = state.across || found.varied[0] || found.others.find((key) => key.endsWith("learning_rate")) || found.results[1];
      if (!up || !across) return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
      const groups = [[board.word("variedKeys"), found.varied], [board.word("metrics"), [...found.results, ...found.measured]], [board.word("allKeys"), found.others]];
      const [xs, ys] = [await axisValues(across, rows), await axisValues(up, rows)];
      const now = JSON.stringify([across, up, state.front, state.log, xs, ys, rows.length]);
      if (now === last) return;
      last = now;
      if (!controls.contains(document.activeElement)) {
        board.fill(controls,
          board.h("label", {}, board.word("up"), " ", select("scatter-y", up, groups.slice(1, 2), (name) => set({ up: name }))),
          board.h("label", {}, board.word("across"), " ", select("scatter-x", across, groups, (name) => set({ across: name }))),
          board.h("label", {}, board.h("input", { type: "checkbox", id: "scatter-log", checked: state.log, onchange: (event) => set({ log: event.target.checked }) }), " ", board.word("logScale")),
          board.h("label", {}, board.h("input", { type: "checkbox", id: "front", checked: state.front, onchange: (event) => set({ front: event.target.checked }) }), " ", board.word("paretoFront")));
      }
      const colours = board.colours(rows.map((row) => row.id));
      const interval = (row, name) => (name.startsWith("metric:") ? row.intervals?.[name.slice(7)] : null) || null;
      const labels = board.labels(rows);
      const points = rows.filter((row) => row.id in xs && typeof ys[row.id] === "number" && Number.isFinite(ys[row.id])).map((row) => ({
        id: row.id, name: labels.get(row.id), x: xs[row.id], y: ys[row.id], xInterval: interval(row, across), yInterval: interval(row, up), colour: colours.get(row.id).colour,
      }));
      if (!points.length) return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
      const left = rows.length - points.length;
      const isNumeric = points.every((point) => typeof point.x === "number");
      const [isLessX, isLessY] = [board.isLessBetter(axisName(across)), board.isLessBetter(axisName(up))];
      const front = state.front && isNumeric ? board.front(points, isLessX, isLessY) : null;
      const svg = scatter({ points, xTitle: axisName(across), yTitle: axisName(up), isXLog: null, isYLog: state.log, front, isLessX });
      const direction = (isLess) => board.word(isLess ? "lessIsBetter" : "moreIsBetter");
      board.fill(place,
        picture(`${axisName(up)} · ${axisName(across)}`, svg, [board.word("run"), axisName(across), axisName(up), ...(front ? [board.word("paretoFront")] : [])],
          points.map((point) => [point.id, board.value(point.x), board.score(point.y, point.yInterval), ...(front ? [front.includes(point.id) ? "✓" : ""] : [])]), linkTo),
        front ? board.h("p", { class: "small" }, board.word("frontSays", { n: front.length, all: points.length, x: axisName(across), xWay: direction(isLessX), y: axisName(up), yWay: direction(isLessY) })) : null,
        left ? board.h("p", { class: "faint small" }, board.word("leftOut", { n: left })) : null);
    } catch (error) {
      board.failed(place, error);
    }
  };
  const stop = board.watchRuns(update);
  return { element: board.h("div", {}, controls, place), update, close: stop };
};
// the front of a sweep with two objectives, as its report has it: { objectives, titles, better: [low | high], best: [ids], points: [{ id, label, values }] }
board.frontPicture = ({ objectives: [first, second], titles: [yTitle, xTitle], better, best, points: given }) => {
  const points = given.map((point) => {
    const intervals = board.store.rows.get(point.id)?.intervals || {};
    return { id: point.id, name: point.label, x: point.values[second], y: point.values[first], xInterval: intervals[second] || null, yInterval: intervals[first] || null, colour: board.colour(best.includes(point.id) ? "--accent" : "--faint") };
  });
  const svg = scatter({ points, xTitle, yTitle, isXLog: null, isYLog: false, front: best, isLessX: better[1] === "low" });
  return picture(board.word("paretoFront"), svg, [board.word("run"), xTitle, yTitle, board.word("paretoFront")], points.map((point) => [point.id, board.value(point.x), board.score(point.y, point.yInterval), best.includes(point.id) ? "✓" : ""]), linkTo);
};

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
  const pass = (row) => [...ranges].every(([name, [low, high]]) => {
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
    board.fill(found, board.h("p", { role: "status" }, board.word("passing", { n: passing.length, all: known.rows.length }), " ",
      passing.length ? board.h("a", { href: board.address("curves", "", { ids: passing.map((row) => row.id).join("\n") }) }, board.word("theirCurves")) : null, " ",
      ranges.size ? board.h("button", { type: "button", class: "small", onclick: () => { ranges.clear(); drawLimits(); paint(); } }, board.word("allAgain")) : null),
      passing.length && passing.length <= 20 ? board.h("ul", { class: "small" }, passing.map((row) => board.h("li", {}, board.runLink(row)))) : null);
  };
  // what brushing with a pointer does, for the keyboard
  const drawLimits = () => board.fill(limits, known.axes.map((axis) => {
    const title = axisName(axis.name);
    if (axis.scale.names) {
      const range = ranges.get(axis.name);
      const only = range && axis.scale.names.filter((name) => axis.scale.place(name) >= range[0] && axis.scale.place(name) <= range[1]);
      return board.h("label", {}, `${title} `, board.h("select", { onchange: (event) => {
        const at = event.target.value === "" ? null : axis.scale.place(event.target.value);
        if (at === null) ranges.delete(axis.name);
        else ranges.set(axis.name, [at - 0.01, at + 0.01]);
        paint();
      } }, board.h("option", { value: "" }, board.word("any")), axis.scale.names.map((name) => board.h("option", { value: name, selected: only?.length === 1 && only[0] === name }, board.short(name, 40)))));
    }
    const range = ranges.get(axis.name);
    const input = (side) => board.h("input", { type: "number", step: "any", "aria-label": board.word(side ? "atMost" : "atLeast", { key: title }), value: range ? Number(axis.scale.value(range[side]).toPrecision(4)) : "", onchange: (event) => {
      const next = [...(ranges.get(axis.name) || [0, 1])];
      next[side] = event.target.value === "" ? side : axis.scale.place(Number(event.target.value));
      if (Number.isNaN(next[side])) next[side] = side;
      ranges.set(axis.name, next);
      paint();
    } });
    return board.h("span", { class: "range" }, `${title} `, input(0), " … ", input(1));
  }));
  const update = async () => {
    try {
      const rows = runs();
      const all = await axes(rows);
      const objectives = objectiveOf(rows, all.results);
      const names = state.axes || [...all.varied.slice(0, 6), ...objectives.slice(0, 2)];
      if (!names.length || !rows.length) return board.fill(place, board.h("p", { class: "faint" }, board.word("noResults")));
      const columns = await Promise.all(names.map(async (name) => ({ name, values: await axisValues(name, rows) })));
      const now = JSON.stringify([columns, rows.length]);
      if (now === last) return;
      last = now;
      const width = Math.max(WIDTH, names.length * 120);
      const [top, bottom] = [44, 24];
      const left = (index) => (names.length < 2 ? width / 2 : 70 + (index * (width - 140)) / (names.length - 1));
      known = { rows: rows.filter((row) => columns.every((axis) => row.id in axis.values)), axes: [] };
      const missing = rows.length - known.rows.length;
      known.axes = columns.map((axis) => ({ ...axis, scale: board.scaleOf(known.rows.map((row) => axis.values[row.id]), axis.name.startsWith("metric:") ? false : null), top: (at) => top + (1 - at) * (height - top - bottom) }));
      const final = known.axes[known.axes.length - 1];
      lines = known.rows.map((row) => {
        const path = known.axes.map((axis, index) => `${index ? "L" : "M"}${left(index)} ${axis.top(axis.scale.place(axis.values[row.id]))}`).join("");
        const share = Math.round(100 * final.scale.place(final.values[row.id]));
        const element = board.svg("path", { d: path, fill: "none", class: "line", stroke: `color-mix(in oklab, #f8631b ${share}%, #3f7de0)`, "stroke-width": 2, onclick: () => board.go("run", row.id) },
          board.svg("title", {}, `${board.line(row.name)}\n${known.axes.map((axis) => `${axisName(axis.name)}: ${board.value(axis.values[row.id])}`).join("\n")}`));
        return { id: row.id, element };
      });
      const svg = board.svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot parallel", role: "img", "data-chart": "parallel", "aria-label": board.word("parallelOf", { n: known.rows.length, axes: names.map(axisName).join(", ") }) },
        lines.map((line) => line.element),
        known.axes.map((axis, index) => {
          axis.brush = board.svg("rect", { x: left(index) - 9, width: 18, y: top, height: 10, class: "brush", visibility: "hidden" });
          const hit = board.svg("rect", { x: left(index) - 22, width: 44, y: top, height: height - top - bottom, fill: "transparent", class: "hit", "data-axis": axis.name });
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
            hit.addEventListener("pointerup", (next) => {
              hit.removeEventListener("pointermove", move);
              if (Math.abs(share(next) - from) < 0.01) ranges.delete(axis.name);
              drawLimits();
              paint();
            }, { once: true });
          });
          return [board.svg("line", { x1: left(index), x2: left(index), y1: top, y2: height - bottom, class: "axis" }), axis.brush,
            axis.scale.ticks.map(({ at, text }) => label(left(index) + 6, axis.top(at) + 4, text, { class: "tick halo" })),
            label(left(index), index % 2 ? 32 : 16, board.short(axisName(axis.name).split(".").pop(), 22) + (axis.scale.isLog ? ` (${board.word("logShort")})` : ""), { "text-anchor": "middle", class: "title" }), hit];
        }));
      const header = [board.word("run"), ...names.map(axisName)];
      board.fill(place, known.rows.length
        ? [picture(board.word("kind.parallel"), svg, header, known.rows.map((row) => [row.id, ...known.axes.map((axis) => board.value(axis.values[row.id]))]), linkTo), board.h("p", { class: "faint small" }, board.word("parallelHelp", { name: axisName(final.name) }))]
        : board.h("p", { class: "faint" }, board.word("noResults")),
      missing ? board.h("p", { class: "faint small" }, board.word("leftOut", { n: missing })) : null);
      if (!picker.contains(document.activeElement)) {
        board.fill(picker, [...new Set([...names, ...all.varied, ...all.results, ...all.others])].slice(0, 150).map((name) => board.h("label", {}, board.h("input", { type: "checkbox", checked: names.includes(name), onchange: (event) => {
          state.axes = event.target.checked ? [...(state.axes || names), name] : (state.axes || names).filter((each) => each !== name);
          ranges.delete(name);
          onchange({ axes: state.axes.join("\n") });
          last = "";
          update();
        } }), " ", axisName(name))));
      }
      if (!limits.contains(document.activeElement)) drawLimits();
      paint();
    } catch (error) {
      board.failed(place, error);
    }
  };
  const stop = board.watchRuns(update);
  return {
    element: board.h("div", {}, board.h("div", { class: "bar" }, board.h("details", { class: "chooser" }, board.h("summary", {}, board.word("axes")), picker), board.h("details", { class: "help" }, board.h("summary", {}, board.word("limits")), limits)), place, found),
    update, close: stop,
  };
};
}
