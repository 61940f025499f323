"use strict";
{
  // Curves of many runs on one picture. uPlot has the axes, the grid and the pointer; the lines are drawn here,
  // because the runs' points lie at different places (tokens, seconds), and joining them would multiply 20 runs
  // of 10,000 points.
  window.board = board;
  const { place, numbers } = board.lines;
  // no half steps on the axis
  const wholes = Array.from({ length: 16 }, (_, power) => [1, 2, 5].map((factor) => factor * 10 ** power)).flat();
  board.charts = []; // the uPlot instances that are on the page now
  // The lines of a picture: { element, set(series, { smoothing, isLog, xTitle }), show(hidden ids), close() }.
  // series: [{ id, name, metric, x, y, step, colour, round, isDashed }]
  board.lineChart = ({ title, height = 300, onclick = null }) => {
    let lines = [];
    let settings = { smoothing: 0, isLog: false, xTitle: "" };
    let hidden = new Set();
    let zoom = null; // { x: [low, high], y: [low, high] } after a selection
    let near = null; // { line, index } under the pointer, or reached by keys
    let u = null;
    const tip = board.h("div", { class: "tip", hidden: true });
    const dot = board.h("div", { class: "dot", hidden: true });
    const above = board.h("canvas", { class: "above", "aria-hidden": "true" });
    const spoken = board.h("p", { class: "hidden", "aria-live": "polite" });
    const box = board.h("div", {
      class: "chart",
      "data-chart": title,
      tabindex: "0",
      role: "application",
      "aria-label": board.word("chartOf", { title }),
      "aria-roledescription": board.word("chart"),
      onkeydown: (event) => key(event),
    });
    const empty = board.h("p", { class: "faint", hidden: true }, board.word("noPoints"));
    const data = board.h("div");
    const alternative = board.h(
      "details",
      { class: "small", ontoggle: () => drawTable() },
      board.h("summary", {}, board.word("asTable")),
      data,
    );
    const back = board.h(
      "button",
      { type: "button", class: "small", hidden: true, onclick: () => rezoom(null) },
      board.word("wholePicture"),
    );
    const element = board.h(
      "figure",
      { class: "card" },
      board.h(
        "figcaption",
        {},
        board.h("strong", {}, title),
        board.h(
          "span",
          { class: "buttons" },
          back,
          board.h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": board.word("save", { kind: "PNG", title }),
              onclick: () => savePicture(),
            },
            "PNG",
          ),
          board.h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": board.word("save", { kind: "CSV", title }),
              onclick: () => saveTable(),
            },
            "CSV",
          ),
        ),
      ),
      box,
      empty,
      spoken,
      alternative,
    );

    const shown = () => lines.filter((line) => !hidden.has(line.id));
    const isDrawn = (value) => Number.isFinite(value) && (!settings.isLog || value > 0);
    const range = () => {
      let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
      for (const { x, raw } of shown()) {
        for (let index = 0; index < x.length; index += 1) {
          if (!isDrawn(raw[index])) continue;
          if (x[index] < x0) x0 = x[index];
          if (x[index] > x1) x1 = x[index];
          if (raw[index] < y0) y0 = raw[index];
          if (raw[index] > y1) y1 = raw[index];
        }
      }
      if (x0 > x1) return null;
      if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
      if (settings.isLog) {
        const margin = Math.max((Math.log10(y1) - Math.log10(y0)) * 0.05, 0.02);
        return { x: [x0, x1], y: [y0 / 10 ** margin, y1 * 10 ** margin] };
      }
      const margin = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 1;
      return { x: [x0, x1], y: [y0 - margin, y1 + margin] };
    };

    // a value's place on a canvas of width and height
    const scaling = (width, height) => {
      const { x, y } = u.scales;
      const of = settings.isLog ? Math.log10 : (value) => value;
      const [low, high] = [of(y.min), of(y.max)];
      return {
        left: (value) => ((value - x.min) / (x.max - x.min)) * width,
        top: (value) => height - ((of(value) - low) / (high - low)) * height,
      };
    };
    const paint = (context, x, y, width, height, thickness, dash) => {
      const { min, max } = u.scales.x;
      return board.paintLine(
        context,
        x,
        y,
        { width, min, max, top: scaling(width, height).top, isDrawn },
        thickness,
        dash,
      );
    };
    const marks = (context, line, width, height, size) => {
      const { left, top } = scaling(width, height);
      // the marks of lines that lie close together are at different places
      let last = left(line.x[0]) - ((lines.indexOf(line) * 37) % 90) * size;
      context.beginPath();
      for (let index = Math.max(0, place(line.x, u.scales.x.min)); index < line.x.length; index += 1) {
        const [x, y] = [left(line.x[index]), top(line.y[index])];
        if (x > width) break;
        if (!Number.isFinite(y) || x - last < (line.round ? 90 * size : 0)) continue;
        last = x;
        const half = (line.x.length < 3 ? 3 : 1.5) * size; // a line of one point is its mark
        if (!line.round) context.rect(x - half, y - half, 2 * half, 2 * half);
        else if (line.round % 2) context.rect(x - 3.5 * size, y - 3.5 * size, 7 * size, 7 * size);
        else {
          context.moveTo(x, y - 5 * size);
          context.lineTo(x + 4.5 * size, y + 3.5 * size);
          context.lineTo(x - 4.5 * size, y + 3.5 * size);
        }
      }
      context.fill();
    };
    const draw = () => {
      const { ctx, bbox } = u;
      const size = window.devicePixelRatio || 1;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      ctx.translate(bbox.left, bbox.top);
      ctx.lineJoin = "bevel";
      for (const line of shown()) {
        ctx.strokeStyle = ctx.fillStyle = line.colour;
        if (settings.smoothing) {
          ctx.globalAlpha = 0.25;
          paint(ctx, line.x, line.raw, bbox.width, bbox.height, size, []);
          ctx.globalAlpha = 1;
        }
        const points = paint(
          ctx,
          line.x,
          line.y,
          bbox.width,
          bbox.height,
          1.6 * size,
          line.isDashed ? [6 * size, 4 * size] : [],
        );
        if (line.round || points < 40) marks(ctx, line, bbox.width, bbox.height, size);
      }
      ctx.restore();
      drawAbove();
    };
    // the line under the pointer, thicker, on a canvas of its own: moving the pointer draws one line and not all
    let drawn = null;
    const drawAbove = (isForced = true) => {
      const line = near && near.line;
      if (!isForced && drawn === line) return;
      drawn = line;
      const { width, height } = u.over.getBoundingClientRect();
      const size = window.devicePixelRatio || 1;
      above.width = width * size;
      above.height = height * size;
      if (!line) return;
      const context = above.getContext("2d");
      context.strokeStyle = context.fillStyle = line.colour;
      context.lineJoin = "bevel";
      paint(context, line.x, line.y, above.width, above.height, 3.5 * size, line.isDashed ? [6 * size, 4 * size] : []);
    };

    const describe = ({ line, index }) => {
      const step =
        line.step && line.step[index] !== undefined && settings.xTitle !== board.word("x.step")
          ? `, ${board.word("x.step")} ${line.step[index].toLocaleString("en-US")}`
          : "";
      const at = settings.isTime ? line.x[index].toFixed(1) : line.x[index].toLocaleString("en-US");
      // the folder's name, where the picture says what was varied
      const run = line.run && line.run !== line.name ? board.line(line.run) : null;
      return [
        line.name,
        run,
        `${settings.xTitle} ${at}${step}`,
        `${line.metric} ${line.raw[index]}`,
        settings.smoothing ? `${board.word("smoothed")} ${board.number(line.y[index], 6)}` : null,
      ].filter(Boolean);
    };
    const point = (next, isSpoken = false) => {
      near = next;
      tip.hidden = dot.hidden = !near;
      drawAbove(false);
      if (!near) return;
      const { width, height } = u.over.getBoundingClientRect();
      const { left, top } = scaling(width, height);
      const [x, y] = [left(near.line.x[near.index]), top(near.line.y[near.index])];
      dot.style.transform = `translate(${x}px, ${y}px)`;
      dot.style.background = near.line.colour;
      const texts = describe(near);
      board.fill(
        tip,
        board.h("strong", {}, texts[0]),
        texts.slice(1).map((text) => board.h("div", {}, text)),
      );
      const isRight = x > width / 2;
      tip.style.left = isRight ? "auto" : `${x + 14}px`;
      tip.style.right = isRight ? `${width - x + 14}px` : "auto";
      tip.style.top = `${Math.max(0, Math.min(y - 20, height - tip.offsetHeight))}px`;
      if (isSpoken) spoken.textContent = texts.join(", ");
    };
    const nearest = () => {
      const { left: cursorX, top: cursorY } = u.cursor;
      if (cursorX === undefined || cursorX < 0) return null;
      const { width, height } = u.over.getBoundingClientRect();
      const { left, top } = scaling(width, height);
      const perPixel = (u.scales.x.max - u.scales.x.min) / width;
      const value = u.scales.x.min + cursorX * perPixel;
      let best = null;
      let distance = Infinity;
      for (const line of shown()) {
        const from = Math.max(0, place(line.x, value - 25 * perPixel) - 1);
        const to = Math.min(line.x.length - 1, place(line.x, value + 25 * perPixel));
        for (let index = from; index <= to; index += 1) {
          if (!isDrawn(line.y[index])) continue;
          const away = Math.hypot(left(line.x[index]) - cursorX, top(line.y[index]) - cursorY);
          if (away < distance) [best, distance] = [{ line, index }, away];
        }
      }
      return best;
    };
    const rezoom = (next) => {
      zoom = next;
      scale();
    };
    const scale = () => {
      const whole = range();
      empty.hidden = whole !== null;
      back.hidden = zoom === null;
      if (!u) return;
      const { x, y } = zoom || whole || { x: [0, 1], y: [0.1, 1] };
      u.batch(() => {
        u.setScale("x", { min: x[0], max: x[1] });
        u.setScale("y", { min: y[0], max: y[1] });
      });
      u.redraw(false);
    };
    // arrow keys: along a line, and from line to line; + and - zoom around the point, 0 and Escape go back
    const key = (event) => {
      const candidates = shown().filter((line) => line.x.length);
      if (!candidates.length || event.ctrlKey || event.metaKey || event.altKey) return;
      const current =
        near && candidates.includes(near.line) ? near : { line: candidates[0], index: candidates[0].x.length };
      const row = candidates.indexOf(current.line);
      const step = event.shiftKey ? Math.max(1, Math.round(current.line.x.length / 20)) : 1;
      const along = (index) => ({ line: current.line, index: Math.max(0, Math.min(current.line.x.length - 1, index)) });
      const across = (next) => {
        const line = candidates[(next + candidates.length) % candidates.length];
        const at = current.line.x[Math.min(current.index, current.line.x.length - 1)];
        return { line, index: Math.min(place(line.x, at), line.x.length - 1) };
      };
      const moves = {
        ArrowLeft: () => along(current.index - step),
        ArrowRight: () => along(current.index + step),
        ArrowUp: () => across(row - 1),
        ArrowDown: () => across(row + 1),
        Home: () => along(0),
        End: () => along(Infinity),
      };
      if (moves[event.key]) point(moves[event.key](), true);
      else if (["+", "=", "-"].includes(event.key)) {
        const { min, max } = u.scales.x;
        const middle = near ? near.line.x[near.index] : (min + max) / 2;
        const half = ((max - min) / 2) * (event.key === "-" ? 2 : 0.5);
        rezoom({ x: [middle - half, middle + half], y: [u.scales.y.min, u.scales.y.max] });
      } else if (event.key === "0" || event.key === "Escape") rezoom(null);
      else if (event.key === "Enter" && near && onclick) onclick(near.line);
      else return;
      event.preventDefault();
    };

    const tick = (_, values) => values.map((value) => (value === null ? "" : board.tick(value)));
    const make = () => {
      if (u) {
        board.charts.splice(board.charts.indexOf(u), 1);
        u.destroy();
      }
      const axis = {
        stroke: () => board.colour("--faint"),
        grid: { stroke: () => board.colour("--line"), width: 1 },
        ticks: { stroke: () => board.colour("--line"), width: 1 },
        font: "12px system-ui, sans-serif",
        values: tick,
      };
      u = new uPlot(
        {
          width: Math.max(200, box.clientWidth),
          height,
          scales: { x: { time: false }, y: { distr: settings.isLog ? 3 : 1, auto: false } },
          series: [{}, { points: { show: false }, paths: () => null }],
          axes: [
            { ...axis, size: 34, incrs: wholes },
            { ...axis, size: 62 },
          ],
          legend: { show: false },
          cursor: {
            drag: { x: true, y: true, uni: 30, setScale: false },
            points: { show: false },
            y: false,
            bind: { dblclick: () => () => rezoom(null) },
          },
          hooks: {
            draw: [draw],
            setCursor: [() => point(nearest())],
            setSelect: [
              () => {
                const { left, top, width, height: tall } = u.select;
                if (width < 3 && tall < 3) return;
                const isWide = width >= 3;
                const isTall = tall >= 3 && tall < u.over.clientHeight;
                rezoom({
                  x: isWide ? [u.posToVal(left, "x"), u.posToVal(left + width, "x")] : [u.scales.x.min, u.scales.x.max],
                  y: isTall ? [u.posToVal(top + tall, "y"), u.posToVal(top, "y")] : [u.scales.y.min, u.scales.y.max],
                });
                u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
              },
            ],
          },
        },
        [
          [0, 1],
          [null, null],
        ],
        box,
      );
      u.over.append(above, dot, tip);
      u.root.setAttribute("aria-hidden", "true");
      board.charts.push(u);
      scale();
    };
    const sized = new ResizeObserver(() => {
      if (!u) return;
      if (box.clientWidth && box.clientWidth !== u.width) u.setSize({ width: box.clientWidth, height });
    });
    sized.observe(box);
    const recolour = () => u && u.redraw(false);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", recolour);

    const drawTable = () => {
      if (!alternative.open) return;
      const rows = shown().map((line) => {
        let [low, high, last] = [-1, -1, -1];
        for (let index = 0; index < line.raw.length; index += 1) {
          if (!Number.isFinite(line.raw[index])) continue;
          if (low < 0 || line.raw[index] < line.raw[low]) low = index;
          if (high < 0 || line.raw[index] > line.raw[high]) high = index;
          last = index;
        }
        const at = (index) =>
          index < 0 ? "" : `${board.number(line.raw[index], 6)} (${line.x[index].toLocaleString("en-US")})`;
        return [
          line.run || line.name,
          line.metric,
          line.isWhole === false ? `${line.x.length}+` : line.x.length,
          at(line.raw.findIndex(Number.isFinite)),
          at(last),
          at(low),
          at(high),
          line.name,
        ];
      });
      const at = ` (${settings.xTitle})`;
      board.fill(
        data,
        board.plainTable(
          title,
          [
            board.word("run"),
            board.word("metric"),
            board.word("points"),
            board.word("firstValue") + at,
            board.word("lastValue") + at,
            board.word("smallest") + at,
            board.word("largest") + at,
            board.word("legend"),
          ],
          rows,
        ),
        lines.some((line) => line.isWhole === false) ? board.h("p", { class: "faint" }, board.word("thinned")) : null,
      );
    };
    const saveTable = () => {
      const rows = shown().flatMap((line) =>
        Array.from(line.x, (x, index) => [
          line.id,
          line.metric,
          x,
          line.step ? line.step[index] : null,
          line.raw[index],
          settings.smoothing ? line.y[index] : null,
        ]),
      );
      board.download(
        `${title}.csv`,
        "text/csv",
        board.csv([["run", "metric", settings.xName || "x", "step", "value", "smoothed"], ...rows]),
      );
    };
    const savePicture = () => {
      const size = window.devicePixelRatio || 1;
      const named = shown();
      const source = u.ctx.canvas;
      const canvas = board.h("canvas");
      canvas.width = source.width;
      canvas.height = source.height + (24 + 18 * named.length) * size;
      const context = canvas.getContext("2d");
      context.fillStyle = board.colour("--card");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(source, 0, 0);
      context.font = `${12 * size}px system-ui, sans-serif`;
      named.forEach((line, row) => {
        const y = source.height + (16 + 18 * row) * size;
        context.fillStyle = line.colour;
        context.fillRect(16 * size, y - 5 * size, 18 * size, 3 * size);
        context.fillStyle = board.colour("--ink");
        context.fillText(`${board.short(line.name, 120)} · ${line.metric}`, 42 * size, y);
      });
      canvas.toBlob((blob) => board.download(`${title}.png`, "image/png", blob));
    };

    return {
      element,
      set: (series, next) => {
        const isOther = !u || next.isLog !== settings.isLog;
        if (next.xTitle !== settings.xTitle || isOther) zoom = null;
        settings = next;
        const before = near && [near.line.id, near.line.metric, near.index];
        lines = series.map((line) => {
          const raw = numbers(line.y);
          return {
            ...line,
            x: numbers(line.x),
            raw,
            y: settings.smoothing ? board.smooth(raw, settings.smoothing) : raw,
          };
        });
        const line = before && lines.find((each) => each.id === before[0] && each.metric === before[1]);
        near = line && before[2] < line.x.length ? { line, index: before[2] } : null;
        if (isOther) make();
        else scale();
        point(near);
        drawTable();
      },
      hide: (ids) => {
        hidden = ids;
        near = null;
        point(null);
        scale();
        drawTable();
      },
      close: () => {
        sized.disconnect();
        scheme.removeEventListener("change", recolour);
        if (!u) return;
        board.charts.splice(board.charts.indexOf(u), 1);
        u.destroy();
      },
    };
  };
}
