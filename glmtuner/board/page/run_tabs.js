"use strict";
{
  // The tabs of a run that ask for more: its training data as they are learned, and its log.
  const kinds = ["prompt", "learned", "stop", "cut"];
  board.samplesTab = (info) => (panel) => {
    const place = board.h("div", { "aria-live": "polite" });
    const dataset = board.h("select", { id: "sample-dataset", onchange: () => load() });
    const count = board.h("input", {
      id: "sample-count",
      type: "number",
      min: "1",
      max: "50",
      value: "3",
      onchange: () => load(),
    });
    let isClosed = false;
    const load = async () => {
      board.fill(place, board.h("p", { class: "faint", role: "status" }, board.word("makingSamples")));
      try {
        const found = await board.get("samples", {
          id: info.row.id,
          dataset: dataset.value || undefined,
          count: count.value,
        });
        if (isClosed) return;
        const names = (found.datasets || []).map((each) => (typeof each === "string" ? each : each.name));
        if (dataset.options.length !== names.length)
          board.fill(
            dataset,
            names.map((name) => board.h("option", { value: name, selected: name === found.dataset }, board.line(name))),
          );
        board.fill(
          place,
          found.template
            ? board.h(
                "p",
                { class: "small" },
                `${board.word("template")} `,
                board.h(
                  "code",
                  {},
                  board.visible(typeof found.template === "string" ? found.template : JSON.stringify(found.template)),
                ),
              )
            : null,
          (found.notes || []).map((text) => board.h("p", { class: "small" }, board.visible(text))),
          found.rows.map((row) =>
            board.h(
              "article",
              { class: "card sample" },
              board.facts(
                Object.entries(row)
                  .filter(
                    ([key, value]) =>
                      value !== null &&
                      typeof value !== "object" &&
                      !kinds.includes(key) &&
                      (key !== "served_prompt" || row.differs),
                  )
                  .map(([key, value]) => [board.line(key), board.value(value)]),
              ),
              board.h(
                "div",
                { class: "segments" },
                row.segments.map((segment) =>
                  board.h(
                    "span",
                    {
                      class: `segment ${kinds.includes(segment.kind) ? segment.kind : ""}`,
                      title: board.maybe("segment", segment.kind),
                    },
                    segment.kind === "stop" ? "■ " : segment.kind === "cut" ? "✂ " : "",
                    board.visible(segment.text),
                  ),
                ),
              ),
            ),
          ),
        );
      } catch (error) {
        if (!isClosed) board.failed(place, error);
      }
    };
    panel.append(
      board.h(
        "div",
        { class: "bar" },
        board.h("label", {}, board.word("dataset"), " ", dataset),
        board.h("label", {}, board.word("howMany"), " ", count),
      ),
      board.h(
        "p",
        { class: "segments key" },
        `${board.word("legend")}: `,
        kinds.map((kind) => [
          board.h(
            "span",
            { class: `segment ${kind}` },
            kind === "stop" ? "■ " : kind === "cut" ? "✂ " : "",
            board.word(`segment.${kind}`),
          ),
          " ",
        ]),
      ),
      place,
    );
    load();
    return () => {
      isClosed = true;
    };
  };

  // What a terminal would show: colours are left out, and of a line that was written over (a progress bar) the
  // last state is kept.
  board.terminal = (text) =>
    board.visible(
      text
        .replace(/\u001b\[[0-9;?]*[A-Za-z]/g, "")
        .replace(/\r+\n/g, "\n")
        .split("\n")
        .map((line) => line.slice(line.replace(/\r+$/, "").lastIndexOf("\r") + 1).replace(/\r+$/, ""))
        .join("\n"),
    );
  const MOST_LOG = 2 ** 21;
  board.logTab = (info) => (panel) => {
    const follow = board.h("input", { type: "checkbox", id: "follow", checked: true });
    const text = board.h("pre", { class: "log", tabindex: "0", role: "log", "aria-label": board.word("tab.log") });
    const status = board.h("p", { class: "faint small", role: "status" });
    let content = "";
    let offset = null;
    let timer = null;
    let isClosed = false;
    const ask = async () => {
      try {
        const found = await board.get("log", offset === null ? { id: info.row.id } : { id: info.row.id, offset });
        if (isClosed) return;
        if (offset !== null && found.size < offset) content = ""; // a new attempt has begun the file again
        if (found.text) {
          content = (content + found.text).slice(-MOST_LOG);
          text.textContent = board.terminal(content);
          if (follow.checked) text.scrollTop = text.scrollHeight;
        }
        const skipped =
          offset === null ? (found.start ?? found.offset - new TextEncoder().encode(found.text).length) : 0;
        if (offset === null && skipped > 0)
          status.textContent = board.word("logBegins", { size: board.bytes(skipped) });
        offset = found.offset;
        if (!content) status.textContent = board.word("logEmpty");
        else if (status.textContent === board.word("logEmpty")) status.textContent = "";
        if (!window.glmtunerStatic) timer = setTimeout(ask, found.offset < found.size ? 50 : 2000);
      } catch (error) {
        if (!isClosed) board.failed(status, error);
      }
    };
    panel.append(
      board.h(
        "div",
        { class: "bar" },
        board.h("label", {}, follow, " ", board.word("follow")),
        board.h(
          "button",
          {
            type: "button",
            class: "small",
            onclick: () => board.download(`${info.row.name}.log`, "text/plain", content),
          },
          board.word("saveLog"),
        ),
      ),
      status,
      text,
    );
    ask();
    return () => {
      isClosed = true;
      clearTimeout(timer);
    };
  };
}
