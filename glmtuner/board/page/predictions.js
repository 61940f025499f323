"use strict";
{
  // The answers of a run: searched, filtered by score, beside the labels or another run's answers, with what differs.
  const LIMIT = 20;
  const MOST_TOKENS = 1500; // of a text that is compared; the table of the comparison grows with the square

  const tokens = (text) => text.match(/[\p{Script=Latin}\p{N}_]+|\s+|[^]/gu) || [];
  // The differences of two texts by words (by characters in Chinese): [{ kind: same | added | removed, text }];
  // null for long ones.
  board.difference = (before, after) => {
    const [a, b] = [tokens(before), tokens(after)];
    let start = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
    let end = 0;
    while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end])
      end += 1;
    const [x, y] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
    if (x.length > MOST_TOKENS || y.length > MOST_TOKENS) return null;
    const width = y.length + 1;
    const longest = new Uint16Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i -= 1) {
      for (let j = y.length - 1; j >= 0; j -= 1) {
        longest[i * width + j] =
          x[i] === y[j]
            ? longest[(i + 1) * width + j + 1] + 1
            : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
      }
    }
    const parts = [];
    const put = (kind, text) => {
      if (!text) return;
      if (parts.length && parts[parts.length - 1].kind === kind) parts[parts.length - 1].text += text;
      else parts.push({ kind, text });
    };
    put("same", a.slice(0, start).join(""));
    let [i, j] = [0, 0];
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) {
        put("same", x[i]);
        i += 1;
        j += 1;
      } else if (i < x.length && (j === y.length || longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
        put("removed", x[i]);
        i += 1;
      } else {
        put("added", y[j]);
        j += 1;
      }
    }
    put("same", a.slice(a.length - end).join(""));
    return parts;
  };
  // what is added is underlined and what is removed is struck through, so that colour is not needed to tell them apart
  board.marked = (before, after) => {
    const parts = board.difference(before, after);
    if (parts === null) return [board.visible(after), board.h("p", { class: "faint small" }, board.word("tooLong"))];
    return parts.map(({ kind, text }) =>
      kind === "same" ? board.visible(text) : board.h(kind === "added" ? "ins" : "del", {}, board.visible(text)),
    );
  };

  // the static version has all lines at once: search, filter and sort as the board does
  const inPage = (answer, asked) => {
    const wanted = (asked.search || "").toLowerCase();
    let lines = answer.lines.filter((line) =>
      [line.prompt, line.label, line.predict].some((text) => String(text).toLowerCase().includes(wanted)),
    );
    if (asked.metric && asked.low !== undefined)
      lines = lines.filter((line) => line.scores?.[asked.metric] >= asked.low);
    if (asked.metric && asked.high !== undefined)
      lines = lines.filter((line) => line.scores?.[asked.metric] <= asked.high);
    if (asked.sort)
      lines = board.sorted(lines, (line) => line.scores?.[asked.sort.replace(/^-/, "")], asked.sort.startsWith("-"));
    return { ...answer, total: lines.length, lines: lines.slice(asked.offset, asked.offset + asked.limit) };
  };

  board.predictions = (panel, id, parameters, change) => {
    let offset = 0;
    let isClosed = false;
    let names = null;
    const redo = () => {
      offset = 0;
      load();
    };
    const later = board.later(redo, 300);
    const search = board.h("input", {
      type: "search",
      id: "prediction-search",
      autocomplete: "off",
      spellcheck: "false",
      oninput: later,
    });
    const metric = board.h(
      "select",
      { id: "prediction-metric", onchange: redo },
      board.h("option", { value: "" }, "–"),
    );
    const low = board.h("input", {
      type: "number",
      step: "any",
      id: "prediction-low",
      "aria-label": board.word("lowest"),
      oninput: later,
    });
    const high = board.h("input", {
      type: "number",
      step: "any",
      id: "prediction-high",
      "aria-label": board.word("highest"),
      oninput: later,
    });
    const order = board.h(
      "select",
      { id: "prediction-sort", onchange: redo },
      [
        ["", "inOrder"],
        ["up", "lowFirst"],
        ["down", "highFirst"],
      ].map(([value, word]) => board.h("option", { value }, board.word(word))),
    );
    const others = board.h("datalist", { id: "other-runs" });
    const other = board.h("input", {
      id: "prediction-with",
      list: "other-runs",
      value: parameters.with || "",
      autocomplete: "off",
      spellcheck: "false",
      placeholder: board.word("noOther"),
      onchange: () => {
        change({ with: other.value || undefined });
        redo();
      },
    });
    const against = board.h(
      "select",
      { id: "prediction-against", onchange: () => draw() },
      ["label", "other", "nothing"].map((name) =>
        board.h(
          "option",
          { value: name, selected: name === (parameters.with ? "other" : "label") },
          board.word(`against.${name}`),
        ),
      ),
    );
    const place = board.h("div");
    const status = board.h("span", { class: "faint small", role: "status" });
    const pages = board.h("div", { class: "bar" });
    let answer = null;
    const number = (input) => (input.value === "" ? undefined : Number(input.value));
    const scores = (values) =>
      Object.entries(values || {})
        .map(([name, value]) => `${name} ${board.number(value)}`)
        .join("  ");
    const draw = () => {
      if (!answer) return;
      const hasOther = answer.lines.some((line) => line.other);
      const isText = (value) => value !== null && value !== undefined;
      const shown = (line, text, isOther) => {
        if (!isText(text)) return board.h("span", { class: "faint" }, "–");
        if (against.value === "label" && isText(line.label)) return board.marked(line.label, text);
        if (against.value === "other" && !isOther && line.other) return board.marked(line.other.predict, text);
        return board.visible(text);
      };
      // records of pairs have no label and answer, but named texts
      const texts = (line) =>
        Object.entries(line.texts || {})
          .filter(([, text]) => isText(text))
          .map(([name, text]) => board.h("p", {}, board.h("strong", {}, `${board.line(name)}: `), board.visible(text)));
      const table = board.h(
        "table",
        { class: "answers" },
        board.h("caption", { class: "hidden" }, board.word("tab.predictions")),
        board.h(
          "thead",
          {},
          board.h(
            "tr",
            {},
            [
              "#",
              board.word("prompt"),
              board.word("label"),
              board.word("answer"),
              hasOther ? board.word("otherAnswer") : null,
            ]
              .filter(Boolean)
              .map((title) => board.h("th", { scope: "col" }, title)),
          ),
        ),
        board.h(
          "tbody",
          {},
          answer.lines.map((line) =>
            board.h(
              "tr",
              {},
              board.h("th", { scope: "row" }, String(line.index)),
              board.h("td", {}, board.visible(line.prompt ?? "")),
              board.h("td", {}, board.visible(line.label ?? "")),
              board.h(
                "td",
                {},
                isText(line.predict) || !Object.keys(line.texts || {}).length
                  ? shown(line, line.predict, false)
                  : texts(line),
                board.h("div", { class: "faint small" }, scores(line.scores)),
              ),
              hasOther
                ? board.h(
                    "td",
                    {},
                    line.other
                      ? [
                          shown(line, line.other.predict, true),
                          board.h("div", { class: "faint small" }, scores(line.other.scores)),
                        ]
                      : board.h("span", { class: "faint" }, "–"),
                  )
                : null,
            ),
          ),
        ),
      );
      board.fill(
        place,
        answer.lines.length
          ? board.h(
              "div",
              { class: "scroll texts", tabindex: "0", role: "region", "aria-label": board.word("tab.predictions") },
              table,
            )
          : board.h("p", { class: "faint" }, board.word("noneFound")),
        (answer.problems || []).map((text) => board.h("p", { class: "small bad" }, board.visible(text))),
      );
      status.textContent = board.word("linesOf", {
        from: answer.total ? offset + 1 : 0,
        to: Math.min(offset + LIMIT, answer.total),
        all: answer.total,
      });
      const go = (next) => () => {
        offset = next;
        load();
      };
      board.fill(
        pages,
        board.h(
          "button",
          { type: "button", disabled: offset === 0, onclick: go(Math.max(0, offset - LIMIT)) },
          board.word("before"),
        ),
        board.h(
          "button",
          { type: "button", disabled: offset + LIMIT >= answer.total, onclick: go(offset + LIMIT) },
          board.word("after"),
        ),
      );
    };
    let asked = 0;
    const load = async () => {
      asked += 1;
      const own = asked;
      const query = {
        id,
        search: search.value || undefined,
        metric: metric.value || undefined,
        low: metric.value ? number(low) : undefined,
        high: metric.value ? number(high) : undefined,
        sort: metric.value && order.value ? `${order.value === "down" ? "-" : ""}${metric.value}` : undefined,
        offset,
        limit: LIMIT,
        with: other.value || undefined,
      };
      try {
        const found = await board.get("predictions", query);
        if (isClosed || own !== asked) return;
        answer = window.glmtunerStatic ? inPage(found, query) : found;
        if (names !== answer.scores.join()) {
          names = answer.scores.join();
          const before = metric.value;
          board.fill(
            metric,
            board.h("option", { value: "" }, "–"),
            answer.scores.map((name) =>
              board.h("option", { value: name, selected: name === before }, board.line(name)),
            ),
          );
        }
        draw();
      } catch (error) {
        if (!isClosed && own === asked) board.failed(place, error);
      }
    };
    panel.append(
      board.h(
        "div",
        { class: "bar" },
        board.h("label", {}, board.word("search"), " ", search),
        board.h("label", {}, board.word("score"), " ", metric),
        board.h("span", { class: "range" }, low, " … ", high),
        board.h("label", {}, board.word("order"), " ", order),
        window.glmtunerStatic ? null : board.h("label", {}, board.word("beside"), " ", other),
        others,
        board.h("label", {}, board.word("differencesTo"), " ", against),
        status,
      ),
      board.h(
        "p",
        { class: "small faint" },
        board.h("ins", {}, board.word("addedText")),
        " ",
        board.h("del", {}, board.word("removedText")),
      ),
      place,
      pages,
    );
    board.fill(place, board.h("p", { class: "faint", role: "status" }, board.word("loading")));
    load();
    const stop = board.watchRuns(() => {
      if (others.childElementCount) return;
      board.fill(
        others,
        [...board.store.rows.values()]
          .filter((row) => row.id !== id)
          .slice(0, 500)
          .map((row) => board.h("option", { value: row.id }, board.line(row.name))),
      );
    });
    return () => {
      isClosed = true;
      stop();
    };
  };
}
