"use strict";
{
  // The form for a run or a sweep: its fields and its command line show the same words.
  const { state, keyOf, valueOf, setValue, commandOf, readCommand, proposal } = board.commandLine;

  const meaning = (texts) => texts[board.language] || texts.en || "";
  // "text or null" in the page's language
  const typeWords = (type) =>
    board.language !== "zh"
      ? type
      : type.replace(
          /one of the choices|whole number|list of|mapping of names to|true or false|any value|numbers?|text|list|mapping|null|or/g,
          (word) => board.typesInChinese[word] || word,
        );
  board.typesInChinese = {
    "one of the choices": "选项之一",
    "whole number": "整数",
    "list of": "列表：",
    "mapping of names to": "名称到值的映射：",
    "true or false": "true 或 false",
    "any value": "任意值",
    number: "数字",
    numbers: "数字",
    text: "文本",
    list: "列表",
    mapping: "映射",
    null: "null",
    or: "或",
  };

  let form = null; // the answer of api/form, by the folder of presets
  const load = async () => {
    const configDir = state.configDir || null;
    if (!form || form.configDir !== configDir)
      form = { ...(await board.get("form", { config_dir: configDir })), configDir };
    return form;
  };

  // a value as one types it
  const typed = (value) =>
    Array.isArray(value)
      ? `[${value.map(typed).join(",")}]`
      : typeof value === "object" && value !== null
        ? JSON.stringify(value)
        : String(value);
  const isListGroup = (group) => group.name === "reward";
  const chosenIn = (group) => {
    const typed = valueOf(group.name);
    return (typed === null ? (group.default ? [group.default] : []) : typed.replace(/^\[|\]$/g, "").split(","))
      .map((name) => name.trim())
      .filter(Boolean);
  };
  const classesIn = (group) => {
    const chosen = chosenIn(group);
    return new Set(
      group.presets.filter((preset) => chosen.includes(preset.name)).map((preset) => preset.class || preset.name),
    );
  };
  const choose = (group, name) => {
    const typed = valueOf(group.name) !== null;
    const chosen = chosenIn(group);
    if (state.multirun || isListGroup(group)) {
      const before = typed ? chosen : [];
      const next = before.includes(name) ? before.filter((each) => each !== name) : [...before, name];
      const text = next.join(",");
      setValue(group.name, next.length ? (isListGroup(group) && next.length > 1 ? `[${text}]` : text) : null);
    } else setValue(group.name, typed && chosen.includes(name) ? null : name);
  };

  const show = (element, _, parameters) => {
    let stopped = false;
    let stopTask = () => {};
    let asked = 0;
    let composed = null; // the configuration of the last words that had no error
    const left = board.h("div", { class: "fields" });
    const command = board.h("textarea", {
      id: "command",
      rows: "5",
      spellcheck: "false",
      autocomplete: "off",
      "aria-describedby": "command-help",
      oninput: () => {
        const whole = readCommand(command.value);
        command.setAttribute("aria-invalid", String(!whole));
        if (!whole) return board.fill(errors, board.h("p", { class: "bad" }, board.word("start.openQuote")));
        render();
        compose();
      },
    });
    const errors = board.h("div", { id: "errors", "aria-live": "polite" });
    const facts = board.h("div", { id: "facts", "aria-live": "polite" });
    const yaml = board.h("pre", { id: "yaml", tabindex: "0", "aria-label": board.word("start.resolved") });
    const output = board.h("div", { id: "begun" });
    const start = board.h(
      "button",
      { type: "button", id: "start", class: "main", onclick: () => begin(null) },
      board.word("start.startHere"),
    );
    const slurm = board.h(
      "button",
      { type: "button", id: "submit-slurm", hidden: true, onclick: () => begin("slurm") },
      board.word("start.submitSlurm"),
    );
    const check = board.h(
      "button",
      { type: "button", id: "check", onclick: () => forecast() },
      board.word("start.checkMemory"),
    );
    const copy = board.h(
      "button",
      { type: "button", id: "copy", onclick: () => board.copy(command.value) },
      board.word("start.copyCommand"),
    );

    const body = () => ({ words: state.words, multirun: state.multirun, config_dir: state.configDir || null });
    const setBusy = (isBusy) => {
      for (const button of [start, slurm, check]) button.disabled = isBusy;
    };

    const showErrors = (found) => {
      for (const field of left.querySelectorAll("[data-key]")) {
        const own = found.filter((error) => error.word && keyOf(error.word) === field.dataset.key);
        const place = field.querySelector(".own-error");
        if (place) place.textContent = own.map((error) => board.visible(error.message)).join(" ");
        const input = field.querySelector("input, select");
        if (input) input.setAttribute("aria-invalid", String(own.length > 0));
      }
      board.fill(
        errors,
        found.map((error) => {
          const better = proposal(error);
          return board.h(
            "div",
            { class: "bad problem", "data-error": error.word || "", role: "alert" },
            board.h("p", {}, board.visible(error.message)),
            better &&
              board.h(
                "button",
                {
                  type: "button",
                  class: "small",
                  "data-proposal": better,
                  onclick: () => {
                    state.words = state.words.map((word) => (word === error.word ? better : word));
                    changed(true);
                  },
                },
                board.word("start.typeInstead", { word: better }),
              ),
          );
        }),
      );
    };

    // What is composed where nothing is typed: the preset's value, and not that of the default preset.
    const showDefaults = (keys) => {
      composed = keys;
      for (const field of left.querySelectorAll("[data-key]")) {
        const key = field.dataset.key;
        if (!(key in keys) || valueOf(key) !== null) continue;
        const control = field.querySelector("input, select");
        if (control.tagName === "SELECT")
          control.options[0].textContent = board.word("start.defaultIs", { value: board.line(typed(keys[key])) });
        else control.placeholder = board.line(typed(keys[key]));
      }
    };
    const composeNow = async () => {
      const number = (asked += 1);
      try {
        const answer = await board.post("compose", body());
        if (stopped || number !== asked) return;
        showErrors(answer.errors);
        facts.removeAttribute("aria-busy");
        setBusy(!answer.ok);
        if (answer.ok) showDefaults(answer.keys);
        yaml.textContent = answer.ok ? board.visible(answer.yaml) : "";
        board.fill(
          facts,
          answer.ok && [
            state.multirun &&
              board.h(
                "p",
                { id: "jobs" },
                board.word(answer.complete ? "start.jobs" : "start.jobsSome", { n: answer.jobs, m: answer.composed }),
              ),
            board.h("p", { class: "faint" }, board.word("start.goesTo", { place: board.line(answer.place) })),
            ...answer.add.map((word) =>
              board.h("p", { class: "faint" }, board.word("start.isAdded", { word: board.line(word) })),
            ),
            ...answer.notes.map((note) => board.h("p", { class: "warn" }, board.visible(note))),
          ],
        );
      } catch (error) {
        facts.removeAttribute("aria-busy");
        if (!stopped && number === asked)
          board.fill(errors, board.h("p", { class: "bad", role: "alert" }, board.visible(error.message)));
      }
    };
    let timer = null;
    const compose = () => {
      clearTimeout(timer);
      setBusy(true); // what is shown is about the words before
      facts.setAttribute("aria-busy", "true");
      timer = setTimeout(composeNow, 250);
    };
    const changed = (all) => {
      command.value = commandOf();
      command.setAttribute("aria-invalid", "false");
      if (all) render();
      compose();
    };

    const forecast = async () => {
      try {
        const begun = await board.post("check", body());
        stopTask();
        stopTask = board.followTask(output, begun.task);
      } catch (error) {
        board.failed(output, error);
      }
    };
    const begin = async (launcher) => {
      setBusy(true);
      stopTask();
      try {
        const begun = await board.post("start", { ...body(), launcher });
        const isSweep = state.multirun || launcher;
        const target = board.address(isSweep ? "sweep" : "run", begun.id);
        const place = board.h("div", {});
        board.fill(
          output,
          board.h(
            "p",
            { class: "good", id: "started", "data-id": begun.id },
            `${board.word("start.started")} `,
            board.h("a", { href: target }, board.line(begun.id)),
          ),
          place,
        );
        const arrive = () => {
          if (!launcher) location.hash = target;
        }; // its folder is written once its model is loaded
        stopTask = board.followTask(place, begun.task, () => setBusy(false), arrive);
      } catch (error) {
        board.failed(output, error);
        setBusy(false);
      }
    };

    const fieldOf = (key) => {
      const group = form.groups.find((each) => each.name === key.group);
      const classes = group ? classesIn(group) : new Set();
      const own = [...classes].map((name) => key.values[name]).find((value) => value !== undefined);
      const initial =
        composed !== null && key.key in composed
          ? typed(composed[key.key])
          : own === undefined
            ? key.default
            : typed(own);
      const value = valueOf(key.key);
      const id = `key-${key.key}`;
      const sets = ["data.dataset", "data.eval_dataset"].includes(key.key)
        ? form.datasets.map((each) => each.name)
        : [];
      const choices = [...key.choices, ...sets];
      const onchange = (event) => {
        setValue(key.key, event.target.value === "" ? null : event.target.value);
        changed(false);
        mark();
      };
      const isSelect = key.choices.length > 0 && !state.multirun && (value === null || key.choices.includes(value));
      const input = isSelect
        ? board.h(
            "select",
            { id, name: key.key, onchange, "aria-describedby": `${id}-about ${id}-error` },
            board.h("option", { value: "" }, board.word("start.defaultIs", { value: initial ?? "" })),
            key.choices.map((choice) => board.h("option", { value: choice, selected: choice === value }, choice)),
          )
        : board.h("input", {
            id,
            name: key.key,
            value: value ?? "",
            placeholder: initial ?? board.word("start.required"),
            list: choices.length ? `${id}-list` : null,
            oninput: onchange,
            autocomplete: "off",
            spellcheck: "false",
            "aria-describedby": `${id}-about ${id}-error`,
          });
      const element = board.h(
        "div",
        { class: "field", "data-key": key.key },
        board.h("label", { for: id }, key.key),
        input,
        !isSelect &&
          choices.length > 0 &&
          board.h(
            "datalist",
            { id: `${id}-list` },
            choices.map((choice) => board.h("option", { value: choice })),
          ),
        board.h(
          "div",
          { class: "about", id: `${id}-about` },
          board.h("span", { class: "kind" }, typeWords(key.type)),
          " ",
          meaning(key.meaning),
        ),
        board.h("div", { class: "bad own-error", id: `${id}-error` }),
      );
      const mark = () => element.classList.toggle("set", valueOf(key.key) !== null);
      mark();
      return element;
    };
    const matches = (key, text) => key.key.includes(text) || meaning(key.meaning).toLowerCase().includes(text);
    const keysOf = (name) => {
      const group = form.groups.find((each) => each.name === name);
      const classes = group ? classesIn(group) : new Set();
      const text = state.search.trim().toLowerCase();
      return form.keys.filter(
        (key) =>
          key.group === name &&
          (valueOf(key.key) !== null ||
            (!state.onlySet &&
              (text || !key.presets.length || !classes.size || key.presets.some((preset) => classes.has(preset))))) &&
          (!text || matches(key, text)),
      );
    };
    const chips = (group) =>
      board.h(
        "div",
        { class: "chips", role: "group", "aria-label": group.name },
        group.presets.map((preset) => {
          const isTyped = valueOf(group.name) !== null;
          const isChosen = chosenIn(group).includes(preset.name);
          return board.h(
            "button",
            {
              type: "button",
              class: "chip",
              id: `chip-${group.name}-${preset.name}`,
              "data-preset": `${group.name}=${preset.name}`,
              "aria-pressed": String(isChosen && isTyped),
              title: preset.about || null,
              onclick: () => {
                choose(group, preset.name);
                changed(true);
              },
            },
            preset.name,
            isChosen && !isTyped ? ` (${board.word("start.default")})` : "",
          );
        }),
      );
    const section = (name, title, about, more) => {
      const keys = keysOf(name);
      const searching = state.search.trim() !== "" || state.onlySet;
      if (searching && !keys.length && !(state.onlySet && valueOf(name) !== null && !state.search.trim())) return null;
      const inside = board.h("div", {});
      const fill = () => board.fill(inside, more, keys.map(fieldOf));
      const isOpen = searching || state.open.has(name);
      if (isOpen) fill();
      const count = state.words.filter((word) => keyOf(word) === name || keysBelow(name, keyOf(word))).length;
      const details = board.h(
        "details",
        {
          "data-group": name,
          open: isOpen,
          ontoggle: () => {
            if (!searching) state.open[details.open ? "add" : "delete"](name);
            if (details.open && !inside.firstChild) fill();
          },
        },
        board.h(
          "summary",
          { id: `group-${name}` },
          board.h("strong", {}, title),
          " ",
          board.h("span", { class: "faint" }, about),
          count > 0 && board.h("span", { class: "count" }, ` ${count}`),
        ),
        inside,
      );
      return details;
    };
    const keysBelow = (name, key) => form.keys.some((each) => each.key === key && each.group === name);
    const render = () => {
      if (!form) return; // typed before the keys came
      const focused =
        document.activeElement && left.contains(document.activeElement) ? document.activeElement.id : null;
      multirun.checked = state.multirun;
      configDir.value = state.configDir;
      const recipe = { name: "experiment", default: null, presets: form.experiments, meaning: { en: "", zh: "" } };
      board.fill(
        left,
        !state.search &&
          !state.onlySet &&
          form.experiments.length > 0 &&
          board.h(
            "div",
            { class: "experiments" },
            board.h("strong", {}, board.word("start.experiments")),
            chips(recipe),
          ),
        section("", board.word("start.wholeRun"), "", null),
        form.groups
          .filter((group) => state.multirun || !group.name.startsWith("hydra/"))
          .map((group) => section(group.name, group.name, meaning(group.meaning), chips(group))),
      );
      const again = focused && document.getElementById(focused);
      if (again) again.focus();
    };

    const search = board.h("input", {
      type: "search",
      id: "key-search",
      value: state.search,
      placeholder: board.word("start.searchKeys"),
      "aria-label": board.word("start.searchKeys"),
      oninput: () => find(),
      onchange: () => find(),
    });
    const find = () => {
      if (state.search === search.value) return;
      state.search = search.value;
      render();
    };
    const onlySet = board.h("input", {
      type: "checkbox",
      id: "only-set",
      checked: state.onlySet,
      onchange: () => {
        state.onlySet = onlySet.checked;
        render();
      },
    });
    const multirun = board.h("input", {
      type: "checkbox",
      id: "multirun",
      checked: state.multirun,
      onchange: () => {
        state.multirun = multirun.checked;
        if (state.multirun) state.open.add("hydra/launcher");
        changed(true);
      },
    });
    const configDir = board.h("input", {
      id: "config-dir",
      value: state.configDir,
      placeholder: "my_conf",
      onchange: () => {
        state.configDir = configDir.value.trim();
        command.value = commandOf();
        reload();
      },
    });
    const reload = async () => {
      try {
        await load();
        if (stopped) return;
        slurm.hidden = !form.slurm;
        board.fill(where, board.word("start.typedIn", { folder: board.line(form.cwd) }));
        render();
        changed(false);
      } catch (error) {
        if (!stopped) board.failed(errors, error);
      }
    };
    const where = board.h("p", { class: "faint", id: "command-help" });
    const begunWith = async () => {
      if (!(await board.mayChange())) return board.fill(element, board.h("p", {}, board.word("start.readOnly")));
      board.fill(
        element,
        board.h("h1", {}, board.word("start.startTitle")),
        board.h(
          "div",
          { class: "starting" },
          board.h(
            "div",
            { class: "left" },
            board.h(
              "div",
              { class: "row" },
              search,
              board.h("label", {}, onlySet, ` ${board.word("start.onlySet")}`),
              board.h("label", {}, multirun, ` ${board.word("start.aSweep")}`),
              board.h("label", {}, `${board.word("start.ownPresets")} `, configDir),
            ),
            left,
          ),
          board.h(
            "div",
            { class: "right card" },
            board.h("label", { for: "command" }, board.word("start.command")),
            command,
            where,
            errors,
            facts,
            board.h("div", { class: "row" }, start, slurm, check, copy),
            output,
            board.h("details", {}, board.h("summary", {}, board.word("start.resolved")), yaml),
          ),
        ),
      );
      if (parameters.clone) {
        try {
          const cloned = await board.get("clone", { id: parameters.clone });
          Object.assign(state, { words: cloned.words, multirun: cloned.multirun, configDir: cloned.config_dir || "" });
          for (const note of cloned.notes) board.notice(board.visible(note));
        } catch (error) {
          board.notice(board.visible(error.message), true);
        }
        history.replaceState(null, "", "#/start");
      }
      command.value = commandOf();
      await reload();
    };
    begunWith().catch((error) => board.failed(element, error));
    return () => {
      stopped = true;
      clearTimeout(timer);
      stopTask();
    };
  };
  board.views.start = { isLive: true, show };
}
