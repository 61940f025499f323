"use strict";
{
  // What can be done with a run or a sweep, and how what was begun is followed.
  let readOnly = null; // not known before the board has said it

  // An element that is filled where something can be changed: not in a static version nor on a read-only board.
  const ifAllowed = (element, fill) => {
    if (window.glmtunerStatic || readOnly === true) return element;
    if (readOnly === false) fill();
    else
      board
        .get("about")
        .then((about) => {
          readOnly = about.read_only;
          if (!readOnly) fill();
        })
        .catch(() => {});
    return element;
  };
  board.mayChange = () =>
    new Promise((resolve, reject) => {
      if (window.glmtunerStatic) return resolve(false);
      if (readOnly !== null) return resolve(!readOnly);
      board.get("about").then((about) => {
        readOnly = about.read_only;
        resolve(!readOnly);
      }, reject);
    });

  const nameOf = (id) => board.line(id.split("/").pop());

  // A question with two buttons; what `fill(body)` adds stands between. Resolves to whether it was answered with yes.
  board.confirm = (text, yes, fill = null) =>
    new Promise((resolve) => {
      const body = board.h("div", {});
      if (fill) fill(body);
      const dialog = board.h(
        "dialog",
        {
          class: "dialog",
          "aria-labelledby": "dialog-text",
          onclose: () => {
            dialog.remove();
            resolve(dialog.returnValue === "yes");
          },
        },
        board.h("p", { id: "dialog-text" }, text),
        body,
        board.h(
          "div",
          { class: "row" },
          board.h(
            "button",
            { type: "button", class: "main", "data-answer": "yes", onclick: () => dialog.close("yes") },
            yes,
          ),
          board.h(
            "button",
            { type: "button", "data-answer": "no", onclick: () => dialog.close("no") },
            board.word("act.cancel"),
          ),
        ),
      );
      document.body.append(dialog);
      dialog.showModal();
    });

  // Shows the lines of a task until it has ended, then calls ended(answer); written() is called once its run or sweep
  // can be shown. Returns the function that stops looking.
  board.followTask = (element, task, ended = () => {}, written = null) => {
    let stopped = false;
    const pre = board.h("pre", { class: "task", tabindex: "0", role: "log", "aria-label": board.word("act.output") });
    const state = board.h("p", { class: "faint" }, board.word("act.isRunning"));
    board.fill(element, state, pre);
    const look = async () => {
      try {
        const answer = await board.get("task", { task });
        if (stopped) return;
        const follows = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
        const text = board.visible(answer.lines.join("\n"));
        if (pre.textContent !== text) pre.textContent = text;
        if (follows) pre.scrollTop = pre.scrollHeight;
        if (answer.written && written) {
          written();
          written = null;
          if (stopped) return;
        }
        if (answer.state === "ended") {
          state.textContent = board.word(answer.code === 0 ? "act.hasEnded" : "act.hasFailed", { code: answer.code });
          state.className = answer.code === 0 ? "faint" : "bad";
          return ended(answer);
        }
      } catch (error) {
        if (stopped) return;
        state.textContent = board.visible(error.message);
      }
      setTimeout(look, 800);
    };
    look();
    return () => {
      stopped = true;
    };
  };

  // A notice with a button.
  const offer = (text, word, onclick) => {
    const notice = board.h(
      "p",
      { class: "notice" },
      text,
      " ",
      board.h(
        "button",
        {
          type: "button",
          onclick: () => {
            notice.remove();
            onclick();
          },
        },
        word,
      ),
    );
    document.getElementById("notices").append(notice);
    setTimeout(() => notice.remove(), 20000);
  };
  const refresh = () => board.refresh && board.refresh();
  const attempt = async (work) => {
    try {
      return await work();
    } catch (error) {
      board.notice(board.visible(error.message), true);
      return null;
    }
  };
  const watch = (task, id, done) => {
    const look = async () => {
      const answer = await attempt(() => board.get("task", { task }));
      if (answer === null) return;
      if (answer.state !== "ended") return void setTimeout(look, 700);
      board.notice(`${nameOf(id)}: ${board.visible(answer.lines.slice(-1)[0] || done)}`, answer.code !== 0);
      refresh();
    };
    look();
  };

  board.act = {
    stop: async (id, sweep = null) => {
      if (!(await board.confirm(board.word("act.stopAsk", { name: nameOf(id) }), board.word("act.stop")))) return;
      let begun;
      try {
        begun = await board.post("stop", { id });
      } catch (error) {
        // a job that shares the process of its sweep
        if (!sweep || !error.message.includes("stop the sweep"))
          return board.notice(board.visible(error.message), true);
        if (!(await board.confirm(board.visible(error.message), board.word("act.stopSweep")))) return;
        begun = await attempt(() => board.post("stop", { id: sweep }));
      }
      if (!begun) return;
      board.notice(board.word("act.stopping", { name: nameOf(id) }));
      watch(begun.task, id, board.word("act.stopped"));
    },
    continue: async (id) => {
      let begun;
      try {
        begun = await board.post("continue", { id });
      } catch (error) {
        if (!error.message.includes("only if you trust it")) return board.notice(board.visible(error.message), true);
        if (!(await board.confirm(board.visible(error.message), board.word("act.trust")))) return;
        begun = await attempt(() => board.post("continue", { id, trust: true }));
      }
      if (!begun) return;
      board.notice(board.word("act.continues", { name: nameOf(id) }));
      refresh();
      const look = async () => {
        // what ends at once has something to say
        const answer = await attempt(() => board.get("task", { task: begun.task }));
        if (answer && answer.state === "ended" && ![0, 130, 140, 143, -15].includes(answer.code))
          board.notice(`${nameOf(id)}: ${board.visible(answer.lines.slice(-1)[0] || "")}`, true);
        else if (answer && answer.state === "running") setTimeout(look, 3000);
        refresh();
      };
      setTimeout(look, 3000);
    },
    clone: (id) => board.go("start", "", { clone: id }),
    talk: (id) => board.go("talk", id),
    delete: async (ids) => {
      const list = (body) =>
        body.append(
          board.h(
            "ul",
            {},
            ids.slice(0, 12).map((id) => board.h("li", {}, board.line(id))),
          ),
          ids.length > 12 ? board.h("p", {}, `… ${ids.length}`) : "",
        );
      if (!(await board.confirm(board.word("act.deleteAsk", { n: ids.length }), board.word("act.delete"), list)))
        return;
      const done = await attempt(() => board.post("delete", { ids }));
      if (!done) return;
      refresh();
      offer(board.word("act.deleted", { n: ids.length, trash: done.trash }), board.word("act.undo"), async () => {
        if (await attempt(() => board.post("restore", { trash: done.trash }))) refresh();
      });
    },
    export: async (id) => {
      const to = board.h("input", { name: "to", value: `exports/${id.split("/").pop()}` });
      const layout = board.h(
        "select",
        { name: "layout" },
        ["transformers", "published"].map((name) => board.h("option", { value: name }, name)),
      );
      const dtype = board.h(
        "select",
        { name: "dtype" },
        board.h("option", { value: "" }, board.word("act.asBase")),
        ["float32", "bfloat16", "float16"].map((name) => board.h("option", { value: name }, name)),
      );
      const fields = (body) =>
        body.append(
          board.h(
            "div",
            { class: "stack" },
            board.h("label", {}, board.word("act.exportTo"), to),
            board.h("label", {}, "layout", layout),
            board.h("label", {}, "dtype", dtype),
          ),
        );
      if (!(await board.confirm(board.word("act.exportAsk", { name: nameOf(id) }), board.word("act.export"), fields)))
        return;
      const begun = await attempt(() =>
        board.post("export", { id, to: to.value.trim() || null, layout: layout.value, dtype: dtype.value || null }),
      );
      if (!begun) return;
      const place = board.h("div", {});
      const dialog = board.h(
        "dialog",
        {
          class: "dialog",
          "aria-label": board.word("act.export"),
          onclose: () => {
            stop();
            dialog.remove();
          },
        },
        place,
        board.h("button", { type: "button", onclick: () => dialog.close() }, board.word("act.close")),
      );
      document.body.append(dialog);
      const stop = board.followTask(place, begun.task, (answer) => {
        if (answer.code === 0)
          place.append(board.h("p", { class: "good" }, board.word("act.exported", { to: board.line(begun.to) })));
      });
      dialog.showModal();
    },
  };

  const button = (action, onclick) =>
    board.h(
      "button",
      { type: "button", class: action === "delete" ? "danger" : null, "data-action": action, onclick },
      board.word(`act.${action}`),
    );

  // The buttons of a run.
  board.actions = (row) => {
    const element = board.h("div", { class: "row actions" });
    const can = row.can || {};
    return ifAllowed(element, () =>
      board.fill(
        element,
        can.stop && button("stop", () => board.act.stop(row.id, row.sweep)),
        can.continue && button("continue", () => board.act.continue(row.id)),
        button("clone", () => board.act.clone(row.id)),
        can.talk && button("talk", () => board.act.talk(row.id)),
        can.talk && button("export", () => board.act.export(row.id)),
        can.delete && button("delete", () => board.act.delete([row.id])),
      ),
    );
  };
  // The buttons of a sweep, of the answer of api/runs or api/sweep: { id, count or jobs }.
  board.sweepActions = (sweep) => {
    const count = sweep.count || Object.fromEntries((sweep.jobs || []).map((job) => [job.state, 1]));
    const active = (count.running || 0) + (count.queued || 0) > 0;
    const unfinished = Object.entries(count).some(
      ([state, n]) => n && !["finished", "dropped", "running", "queued"].includes(state),
    );
    const element = board.h("div", { class: "row actions" });
    return ifAllowed(element, () =>
      board.fill(
        element,
        active && button("stop", () => board.act.stop(sweep.id)),
        !active && unfinished && button("continue", () => board.act.continue(sweep.id)),
        button("clone", () => board.act.clone(sweep.id)),
        !active && button("delete", () => board.act.delete([sweep.id])),
      ),
    );
  };
  // The buttons of several runs that are ticked.
  board.actionsFor = (rows) => {
    const runs = rows.filter(Boolean);
    const element = board.h("span", { class: "row actions" });
    return ifAllowed(element, () =>
      board.fill(
        element,
        runs.some((row) => row.can?.stop) &&
          button("stop", async () => {
            for (const row of runs.filter((each) => each.can?.stop)) await board.act.stop(row.id, row.sweep);
          }),
        runs.some((row) => row.can?.delete) &&
          button("delete", () => board.act.delete(runs.filter((row) => row.can?.delete).map((row) => row.id))),
      ),
    );
  };

  board.views.trash = {
    isLive: true,
    show: (element) => {
      const list = board.h("div", { "aria-live": "polite" });
      board.fill(element, board.h("h1", {}, board.word("act.trash")), list);
      const load = async () => {
        try {
          const { folder, deleted } = await board.get("trash");
          board.fill(
            list,
            board.h("p", { class: "faint" }, board.word("act.trashIs", { folder: board.line(folder) })),
            deleted.length
              ? deleted.map((each) =>
                  board.h(
                    "section",
                    { class: "card" },
                    board.h(
                      "p",
                      {},
                      new Date(each.time * 1000).toLocaleString(document.documentElement.lang, { hour12: false }),
                    ),
                    board.h(
                      "ul",
                      {},
                      each.ids.map((id) => board.h("li", {}, board.line(id))),
                    ),
                    board.h(
                      "button",
                      {
                        type: "button",
                        "data-action": "restore",
                        onclick: async () => {
                          if (await attempt(() => board.post("restore", { trash: each.trash }))) load();
                        },
                      },
                      board.word("act.restore"),
                    ),
                  ),
                )
              : board.h("p", {}, board.word("act.trashEmpty")),
          );
        } catch (error) {
          board.fill(list, board.h("p", { class: "bad", role: "alert" }, board.visible(error.message)));
        }
      };
      load();
    },
  };
}
