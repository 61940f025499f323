"use strict";
{
  // Talking with one run, or with two side by side: each has its own process and its own history of the conversation.
  const settings = {
    system: "",
    temperature: "",
    top_p: "",
    max_tokens: "",
    seed: "",
    repetition_penalty: "",
    thinking: "",
    tools: "",
  };
  const numbers = ["temperature", "top_p", "max_tokens", "seed", "repetition_penalty"];

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts)
        if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }

  // A side of the page: a run, whether it is loaded, and what was said.
  const makeSide = (number, onready) => {
    const side = { id: "", talk: null, about: null, turns: [], asking: null, stopped: false };
    const state = board.h("p", { class: "faint", "aria-live": "polite" });
    const history = board.h("div", { class: "turns", role: "log", "aria-label": board.word("talk.conversation") });
    const log = board.h("pre", { hidden: true, tabindex: "0", "aria-label": board.word("act.output") });
    const buttons = board.h("div", { class: "row" });
    side.element = board.h(
      "section",
      { class: "side-by-side", "data-side": String(number) },
      state,
      buttons,
      log,
      history,
    );

    side.open = async (id) => {
      side.close();
      Object.assign(side, { id, turns: [], about: null });
      board.fill(history);
      if (!id) return (board.fill(state), board.fill(buttons));
      state.className = "faint";
      board.fill(state, board.word("talk.loading", { name: board.line(id) }));
      try {
        const opened = await board.post("talk/open", { id });
        side.talk = opened.talk;
        await side.wait(opened);
      } catch (error) {
        state.className = "bad";
        board.fill(state, board.visible(error.message));
      }
    };
    side.wait = async (known) => {
      let about = known;
      const talk = side.talk;
      while (about.state === "loading") {
        await new Promise((resolve) => setTimeout(resolve, 500));
        if (side.stopped || side.talk !== talk) return;
        about = await board.get("talks", { talk });
      }
      if (side.stopped || side.talk !== talk) return;
      log.hidden = about.state === "ready";
      log.textContent = board.visible(about.lines.join("\n"));
      if (about.state !== "ready") {
        state.className = "bad";
        side.talk = null;
        return board.fill(state, board.word("talk.notLoaded", { name: board.line(side.id) }));
      }
      side.about = about;
      board.fill(state, board.word("talk.ready", { name: board.line(side.id) }));
      board.fill(
        buttons,
        board.h("a", { href: board.address("run", side.id) }, board.word("talk.theRun")),
        board.h(
          "button",
          { type: "button", "data-action": "export", onclick: () => board.act.export(side.id) },
          board.word("act.export"),
        ),
        board.h(
          "button",
          {
            type: "button",
            "data-action": "unload",
            onclick: () => {
              side.close(true);
              side.id = "";
              board.fill(buttons);
              board.fill(state, board.word("talk.unloaded"));
              onready();
            },
          },
          board.word("talk.unload"),
        ),
      );
      onready();
    };
    side.close = (ends = false) => {
      if (side.asking) side.asking.abort();
      if (ends && side.talk) board.post("talk/close", { talk: side.talk }).catch(() => {});
      side.talk = side.about = null;
    };
    side.clear = () => {
      if (side.asking) side.asking.abort();
      side.turns = [];
      board.fill(history);
    };

    const follow = (work) => {
      const follows = history.scrollHeight - history.scrollTop - history.clientHeight < 60;
      work();
      if (follows) history.scrollTop = history.scrollHeight;
    };
    const parameters = () => {
      const found = {};
      for (const name of numbers) if (settings[name] !== "") found[name] = Number(settings[name]);
      if (settings.thinking && side.about.thinking)
        found.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
      if (settings.tools.trim() && side.about.tools) found.tools = JSON.parse(settings.tools);
      return found;
    };
    side.ask = async (message) => {
      const before = side.turns;
      side.turns = [...before, message];
      const answer = { role: "assistant", content: "" };
      const calls = [];
      const said = board.h("div", { class: "answer waits" });
      const thought = board.h("div", { class: "thought-text" });
      const thoughts = board.h(
        "details",
        { class: "thought", open: true, hidden: true },
        board.h("summary", {}, board.word("talk.thought")),
        thought,
      );
      const called = board.h("div", {});
      const about = board.h("div", { class: "faint about" });
      follow(() =>
        history.append(
          board.h(
            "div",
            { class: message.role === "tool" ? "question tool" : "question" },
            board.visible(message.content),
          ),
          board.h("div", { class: "turn" }, thoughts, said, called, about),
        ),
      );
      side.asking = new AbortController();
      const began = performance.now();
      let first = null;
      let usage = null;
      let reason = "";
      try {
        const messages = [
          ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
          ...side.turns,
        ];
        const response = await fetch("api/talk/chat", {
          method: "POST",
          headers: board.headers(),
          signal: side.asking.signal,
          body: JSON.stringify({ talk: side.talk, messages, parameters: parameters() }),
        });
        if (!response.ok) throw new Error((await response.json()).error);
        for await (const event of events(response)) {
          if (event.error) throw new Error(event.error.message);
          const choice = event.choices[0];
          const delta = choice?.delta || {};
          if (first === null && (delta.content || delta.reasoning_content || delta.tool_calls))
            first = performance.now();
          if (delta.reasoning_content) {
            answer.reasoning_content = (answer.reasoning_content || "") + delta.reasoning_content;
            follow(() => {
              thoughts.hidden = false;
              thought.textContent = board.visible(answer.reasoning_content);
            });
          }
          if (delta.content) {
            answer.content += delta.content;
            follow(() => {
              said.textContent = board.visible(answer.content);
            });
          }
          for (const part of delta.tool_calls || []) {
            calls[part.index] = calls[part.index] || {
              id: part.id,
              type: "function",
              function: { name: part.function.name, arguments: "" },
            };
            calls[part.index].function.arguments += part.function.arguments || "";
          }
          if (choice?.finish_reason) reason = choice.finish_reason;
          if (event.usage) usage = event.usage;
        }
        if (calls.length) answer.tool_calls = calls;
        side.turns = [...side.turns, answer];
      } catch (error) {
        if (error.name === "AbortError") {
          reason = "stopped";
          if (answer.content) side.turns = [...side.turns, answer];
          else side.turns = before;
        } else {
          side.turns = before;
          about.append(board.h("p", { class: "bad", role: "alert" }, board.visible(error.message)));
        }
      }
      side.asking = null;
      said.classList.remove("waits");
      if (!answer.content) said.hidden = true;
      const seconds = first === null ? 0 : (performance.now() - first) / 1000;
      const parts = [
        reason && reason !== "stop" && reason !== "tool_calls" ? board.word("talk.ended", { reason }) : null,
        usage &&
          board.word("talk.speed", {
            n: usage.completion_tokens,
            speed:
              seconds > 0 && usage.completion_tokens > 1 ? ((usage.completion_tokens - 1) / seconds).toFixed(1) : "–",
            wait: first === null ? "–" : ((first - began) / 1000).toFixed(2),
          }),
      ].filter(Boolean);
      follow(() => {
        about.prepend(parts.join(" · "));
        if (calls.length)
          board.fill(
            called,
            calls.map((call) => callOf(call)),
          );
      });
    };
    // a call of a tool, and a field for what the tool answers
    const callOf = (call) => {
      const result = board.h("input", {
        "aria-label": board.word("talk.toolResult"),
        placeholder: board.word("talk.toolResult"),
      });
      return board.h(
        "div",
        { class: "call" },
        board.h("strong", {}, board.visible(call.function.name)),
        board.h("pre", {}, board.visible(call.function.arguments)),
        board.h(
          "form",
          {
            class: "row",
            onsubmit: (event) => {
              event.preventDefault();
              if (!side.asking && side.about) side.ask({ role: "tool", tool_call_id: call.id, content: result.value });
            },
          },
          result,
          board.h("button", {}, board.word("talk.sendResult")),
        ),
      );
    };
    return side;
  };

  const show = (element, id, parameters) => {
    let stopWatching = () => {};
    let sides = [];
    const wanted = [id, parameters.with || ""];
    const ready = () => sides.filter((side) => side.about);
    const state = () => {
      const able = ready();
      question.disabled = send.disabled = !able.length;
      send.textContent = board.word(sides.some((side) => side.asking) ? "act.stop" : "talk.send");
      thinking.parentElement.hidden = !able.some((side) => side.about.thinking);
      tools.parentElement.hidden = !able.some((side) => side.about.tools);
    };
    const send = board.h("button", { type: "submit", id: "send", class: "main" }, board.word("talk.send"));
    const question = board.h("textarea", {
      id: "question",
      rows: "2",
      disabled: true,
      "aria-label": board.word("talk.question"),
      placeholder: board.word("talk.question"),
      onkeydown: (event) => {
        // Enter that picks a word of an input method must not send
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
          event.preventDefault();
          if (!sides.some((side) => side.asking)) form.requestSubmit();
        }
      },
    });
    const form = board.h(
      "form",
      {
        class: "row ask",
        onsubmit: async (event) => {
          event.preventDefault();
          const busy = sides.filter((side) => side.asking);
          if (busy.length) return busy.forEach((side) => side.asking.abort());
          const text = question.value.trim();
          if (!text) return;
          if (settings.tools.trim()) {
            try {
              JSON.parse(settings.tools);
            } catch (error) {
              return board.notice(board.word("talk.badTools", { reason: error.message }), true);
            }
          }
          question.value = "";
          const answers = ready().map((side) => side.ask({ role: "user", content: text }));
          state();
          await Promise.all(answers);
          state();
          if (document.body.contains(question)) question.focus();
        },
      },
      question,
      send,
      board.h(
        "button",
        { type: "button", id: "new-talk", onclick: () => sides.forEach((side) => side.clear()) },
        board.word("talk.newTalk"),
      ),
    );
    const setting = (name, control) => {
      control.id = `talk-${name}`;
      control.value = settings[name];
      control.addEventListener("input", () => {
        settings[name] = control.value;
      });
      return board.h("label", { for: control.id }, board.word(`talk.${name}`), control);
    };
    const number = (name, step) =>
      setting(name, board.h("input", { type: "number", step, placeholder: board.word("talk.ofRun") }));
    const thinking = board.h(
      "select",
      {},
      ["", "on", "off"].map((value) => board.h("option", { value }, value || board.word("talk.ofRun"))),
    );
    const tools = board.h("textarea", {
      rows: "3",
      spellcheck: "false",
      placeholder: '[{"type": "function", "function": {"name": "…"}}]',
    });
    const panel = board.h(
      "details",
      { class: "card settings" },
      board.h("summary", {}, board.word("talk.settings")),
      board.h(
        "div",
        { class: "grid" },
        setting("system", board.h("textarea", { rows: "2" })),
        number("temperature", "any"),
        number("top_p", "any"),
        number("max_tokens", "1"),
        number("seed", "1"),
        number("repetition_penalty", "any"),
        setting("thinking", thinking),
        setting("tools", tools),
      ),
    );
    const selects = [0, 1].map((place) =>
      board.h("select", {
        id: `talk-run-${place}`,
        "aria-label": board.word(place ? "talk.secondRun" : "talk.firstRun"),
        onchange: (event) => {
          wanted[place] = event.target.value;
          const chosen = { with: wanted[1] };
          history.replaceState(null, "", board.address("talk", wanted[0], chosen));
          sides[place].open(event.target.value).then(state);
          state();
        },
      }),
    );
    const fill = (rows) =>
      selects.forEach((select, place) => {
        const names = rows.filter((row) => row.can?.talk || row.id === wanted[place]).map((row) => row.id);
        if (wanted[place] && !names.includes(wanted[place])) names.unshift(wanted[place]);
        const text = names.join("\n");
        if (select.dataset.names === text || select === document.activeElement) return;
        select.dataset.names = text;
        board.fill(
          select,
          board.h("option", { value: "" }, board.word(place ? "talk.noSecond" : "talk.chooseRun")),
          names.map((name) => board.h("option", { value: name, selected: name === wanted[place] }, board.line(name))),
        );
      });
    const begin = async () => {
      if (!(await board.mayChange())) return board.fill(element, board.h("p", {}, board.word("start.readOnly")));
      sides = [makeSide(0, state), makeSide(1, state)];
      board.fill(
        element,
        board.h("h1", {}, board.word("talk.talkTitle")),
        board.h("div", { class: "row" }, selects),
        panel,
        board.h(
          "div",
          { class: "sides" },
          sides.map((side) => side.element),
        ),
        form,
      );
      fill([]);
      stopWatching = board.watchRuns(() => fill([...board.store.rows.values()]));
      state();
      sides.forEach((side, place) => {
        if (wanted[place]) side.open(wanted[place]).then(state);
      });
    };
    begin().catch((error) => board.failed(element, error));
    return () => {
      stopWatching();
      for (const side of sides) {
        side.stopped = true;
        side.close();
      }
    };
  };
  board.views.talk = { isLive: true, show };
}
