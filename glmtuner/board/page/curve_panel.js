"use strict";
{
  // The curves of runs with their controls, for any view.
  const MOST = 100; // runs on one picture
  board.mostCurves = MOST;
  const POINTS = 10000; // of a series; above, the board sends the lowest and the highest of each stretch

  // The series of runs, kept and asked for again only where the run has gone on: board.series(ids, metrics, x)
  // -> { series, missing: [{ id, why }] }.
  const kept = new Map();
  const fresh = (id) => board.store.rows.get(id)?.updated ?? 0;
  board.series = async (ids, metrics, x) => {
    const key = (id) => `${x}\n${id}`;
    const missing = ids.filter((id) => {
      const entry = kept.get(key(id));
      return !entry || entry.updated !== fresh(id) || metrics.some((metric) => !entry.metrics.has(metric));
    });
    const take = (id, series, asked, why = null) =>
      kept.set(key(id), { updated: fresh(id), metrics: new Set(asked), series, why });
    if (window.glmtunerStatic) {
      await Promise.all(
        missing.map(async (id) => {
          const answer = await board
            .get("curves", { id })
            .catch((error) => ({ series: [], missing: [{ id, why: error.message }] }));
          const series = x === "step" ? answer.series : (answer.by || {})[x] || [];
          take(
            id,
            series,
            [...metrics, ...series.map((line) => line.metric)],
            (answer.missing || []).find((each) => each.id === id)?.why,
          );
        }),
      );
    } else if (missing.length && metrics.length) {
      const asked = [...new Set([...metrics, ...missing.flatMap((id) => [...(kept.get(key(id))?.metrics || [])])])];
      const answer = await board.get("curves", { id: missing, metric: asked, x, points: POINTS });
      for (const id of missing)
        take(
          id,
          answer.series.filter((line) => line.id === id),
          asked,
          (answer.missing || []).find((each) => each.id === id)?.why,
        );
    }
    return {
      series: ids.flatMap((id) => (kept.get(key(id))?.series || []).filter((line) => metrics.includes(line.metric))),
      missing: ids.map((id) => ({ id, why: kept.get(key(id))?.why })).filter((each) => each.why),
    };
  };
  // eval_loss belongs on the picture of loss
  const pictureOf = (metric) => metric.replace(/^eval_/, "");

  // The curves of some runs with their controls: { element, close }. `runs()` gives the rows; `parameters` is
  // what the address says.
  board.curvePanel = ({ runs, parameters = {}, onchange = () => {} }) => {
    const state = {
      x: ["step", "tokens", "time"].includes(parameters.x) ? parameters.x : board.setting("curves-x", "step"),
      smoothing: Number(parameters.smoothing ?? board.setting("curves-smoothing", 0)) || 0,
      isLog: (parameters.log ?? String(board.setting("curves-log", false))) === "true",
      metrics: parameters.metrics ? parameters.metrics.split("\n") : null,
    };
    let names = [];
    let hidden = new Set();
    let isClosed = false;
    const charts = new Map();
    const grid = board.h("div", { class: "charts" });
    const legend = board.h("ul", { class: "legend", "aria-label": board.word("legend") });
    const failure = board.h("p", { class: "bad", role: "alert", hidden: true });
    const absent = board.h("ul", { class: "faint small", hidden: true });
    const picker = board.h("div", { class: "menu card" });
    const remember = () => {
      board.remember("curves-x", state.x);
      board.remember("curves-smoothing", state.smoothing);
      board.remember("curves-log", state.isLog);
      onchange({
        x: state.x,
        smoothing: state.smoothing,
        log: state.isLog,
        metrics: state.metrics ? state.metrics.join("\n") : undefined,
      });
      redraw();
    };
    const shownSmoothing = board.h("output", {}, String(state.smoothing));
    const controls = board.h(
      "div",
      { class: "bar" },
      board.h(
        "label",
        {},
        board.word("xAxis"),
        " ",
        board.h(
          "select",
          {
            id: "curve-x",
            onchange: (event) => {
              state.x = event.target.value;
              remember();
            },
          },
          ["step", "tokens", "time"].map((name) =>
            board.h("option", { value: name, selected: name === state.x }, board.word(`x.${name}`)),
          ),
        ),
      ),
      board.h(
        "label",
        {},
        board.word("smoothing"),
        " ",
        board.h("input", {
          id: "smoothing",
          type: "range",
          min: "0",
          max: "0.99",
          step: "0.01",
          value: String(state.smoothing),
          oninput: (event) => {
            state.smoothing = Number(event.target.value);
            shownSmoothing.textContent = event.target.value;
            later();
          },
        }),
        " ",
        shownSmoothing,
      ),
      board.h(
        "label",
        {},
        board.h("input", {
          id: "log-y",
          type: "checkbox",
          checked: state.isLog,
          onchange: (event) => {
            state.isLog = event.target.checked;
            remember();
          },
        }),
        " ",
        board.word("logScale"),
      ),
      board.h("details", { class: "chooser" }, board.h("summary", {}, board.word("metrics")), picker),
      board.h("span", { class: "faint small" }, board.word("chartHelp")),
    );
    const later = board.later(remember, 60);
    const chosen = () => state.metrics || names.filter((name) => ["loss", "eval_loss"].includes(name));
    const drawPicker = () =>
      board.fill(
        picker,
        names.map((name) =>
          board.h(
            "label",
            {},
            board.h("input", {
              type: "checkbox",
              checked: chosen().includes(name),
              onchange: (event) => {
                state.metrics = names.filter((each) =>
                  each === name ? event.target.checked : chosen().includes(each),
                );
                remember();
              },
            }),
            " ",
            board.line(name),
          ),
        ),
      );
    const hide = () => {
      for (const chart of charts.values()) chart.hide(hidden);
      drawLegend();
    };
    const drawLegend = () => {
      const focused = document.activeElement?.dataset?.legend;
      const rows = runs();
      const colours = board.colours(rows.map((row) => row.id));
      const labels = board.labels(rows);
      board.fill(
        legend,
        rows.map((row) =>
          board.h(
            "li",
            {},
            board.h(
              "button",
              {
                type: "button",
                class: "entry",
                "data-legend": `show ${row.id}`,
                "aria-pressed": String(!hidden.has(row.id)),
                title: board.line(row.id),
                onclick: () => {
                  hidden = new Set(hidden);
                  if (!hidden.delete(row.id)) hidden.add(row.id);
                  hide();
                },
              },
              board.swatch(colours.get(row.id)),
              " ",
              labels.get(row.id),
            ),
            rows.length > 1
              ? board.h(
                  "button",
                  {
                    type: "button",
                    class: "only",
                    "data-legend": `only ${row.id}`,
                    "aria-label": board.word("only", { name: labels.get(row.id) }),
                    onclick: () => {
                      const others = rows.filter((each) => each.id !== row.id).map((each) => each.id);
                      hidden =
                        others.every((id) => hidden.has(id)) && !hidden.has(row.id) ? new Set() : new Set(others);
                      hide();
                    },
                  },
                  board.word("onlyShort"),
                )
              : null,
          ),
        ),
      );
      if (focused) [...legend.querySelectorAll("button")].find((button) => button.dataset.legend === focused)?.focus();
    };

    let isBusy = false;
    let isStale = false;
    let namesOf = "";
    let quietUntil = 0; // curves that grow take at most a quarter of the time, however many they are
    let waiting = null;
    const grow = () => {
      clearTimeout(waiting);
      waiting = setTimeout(redraw, Math.max(0, quietUntil - Date.now()));
    };
    const redraw = async () => {
      if (isBusy) {
        isStale = true;
        return;
      }
      isBusy = true;
      const began = Date.now();
      try {
        const rows = runs()
          .filter((row) => row.updated)
          .slice(0, MOST); // those that have begun
        const ids = rows.map((row) => row.id);
        const version = rows.map((row) => `${row.id} ${row.updated}`).join("\n");
        if (version !== namesOf && ids.length) {
          namesOf = version;
          const found = window.glmtunerStatic
            ? (await Promise.all(ids.map((id) => board.get("metrics", { id }).catch(() => [])))).flat()
            : await board.get("metrics", { id: ids });
          const next = [...new Set(found)];
          if (next.join("\n") !== names.join("\n")) {
            names = next;
            drawPicker();
          }
        }
        const metrics = chosen().filter((name) => names.includes(name));
        const { series, missing } = await board.series(ids, metrics, state.x);
        if (isClosed) return;
        absent.hidden = !missing.length;
        const colours = board.colours(ids);
        const labels = board.labels(rows);
        const folders = new Map(rows.map((row) => [row.id, row.name]));
        board.fill(
          absent,
          missing.map(({ id, why }) =>
            board.h("li", {}, board.word("notDrawn", { name: labels.get(id), why: board.visible(why) })),
          ),
        );
        const pictures = [...new Set(metrics.map(pictureOf))];
        for (const [name, chart] of charts) {
          if (pictures.includes(name)) continue;
          chart.close();
          chart.element.remove();
          charts.delete(name);
        }
        for (const picture of pictures) {
          if (!charts.has(picture)) {
            const chart = board.lineChart({ title: picture, onclick: (line) => board.go("run", line.id) });
            charts.set(picture, chart);
            grid.append(chart.element);
          }
          const own = series
            .filter((line) => pictureOf(line.metric) === picture)
            .map((line) => ({
              ...line,
              ...colours.get(line.id),
              name: labels.get(line.id),
              run: folders.get(line.id),
              isDashed: line.metric.startsWith("eval_"),
              isWhole: line.whole,
            }))
            .sort((a, b) => a.isDashed - b.isDashed); // evaluation above training, and after it for the arrow keys
          charts.get(picture).set(own, {
            smoothing: state.smoothing,
            isLog: state.isLog,
            isTime: state.x === "time",
            xTitle: board.word(`x.${state.x}`),
            xName: state.x,
          });
        }
        failure.hidden = true;
      } catch (error) {
        if (!isClosed) {
          failure.hidden = false;
          failure.textContent = board.visible(error.message);
        }
      }
      isBusy = false;
      quietUntil = Date.now() + 3 * (Date.now() - began);
      if (isStale && !isClosed) {
        isStale = false;
        redraw();
      }
    };
    let seen = "";
    const update = () => {
      // the jobs of a running sweep learn what was varied when they begin
      const now = [...board.labels(runs())].join("\n");
      if (now !== seen) {
        seen = now;
        drawLegend();
        redraw();
      } else grow();
    };
    const stop = board.watchRuns((changed) => {
      const ids = new Set(runs().map((row) => row.id));
      if (ids.size && (seen === "" || changed.some((id) => ids.has(id)))) update();
    });
    return {
      element: board.h(
        "div",
        {},
        controls,
        board.h("p", { class: "faint small" }, board.word("dashes")),
        legend,
        failure,
        absent,
        grid,
      ),
      update,
      close: () => {
        isClosed = true;
        stop();
        clearTimeout(waiting);
        for (const chart of charts.values()) chart.close();
      },
    };
  };
}
