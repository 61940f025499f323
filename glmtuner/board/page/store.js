"use strict";
{
  // The rows of all runs, asked for every two seconds while somebody looks; views listen to what has changed.
  const listeners = new Set();
  const period = 2000;
  let timer = null;
  let isAsking = false;
  let isFirst = true;
  // what is shown may be old as long as the board does not answer
  const lost = board.h("p", { class: "notice bad", role: "status", id: "lost", hidden: true });
  board.store = { rows: new Map(), sweeps: [], problems: [], version: null, time: null, received: 0, error: null };
  board.checked = new Set(); // ids of the runs and sweeps that are ticked, until the page is left

  const ask = async () => {
    clearTimeout(timer);
    timer = null;
    if (isAsking) return;
    isAsking = true;
    const store = board.store;
    let changed = [];
    const before = store.error;
    const sweeps = JSON.stringify(store.sweeps);
    try {
      const answer = await board.get("runs", store.version === null ? {} : { since: store.version });
      const kept = new Set(answer.rows.map((row) => row.id));
      const gone =
        answer.whole || store.version === null
          ? [...store.rows.keys()].filter((id) => !kept.has(id))
          : answer.removed || [];
      for (const row of answer.rows) store.rows.set(row.id, row);
      for (const id of gone) {
        store.rows.delete(id);
        board.checked.delete(id);
      }
      changed = [...answer.rows.map((row) => row.id), ...gone];
      Object.assign(store, {
        sweeps: answer.sweeps,
        problems: answer.problems || [],
        version: answer.version,
        time: answer.time,
        received: Date.now(),
        error: null,
      });
    } catch (error) {
      store.error = error;
    }
    isAsking = false;
    lost.hidden = store.error === null;
    lost.textContent = store.error === null ? "" : board.visible(store.error.message);
    if (!lost.isConnected) document.getElementById("notices").before(lost);
    if (changed.length || isFirst || before !== store.error || sweeps !== JSON.stringify(store.sweeps)) {
      for (const listener of [...listeners]) listener(changed);
    }
    isFirst = false;
    if (listeners.size && !window.glmtunerStatic && !document.hidden) timer = setTimeout(ask, period);
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && listeners.size && !window.glmtunerStatic) ask();
  });

  // Calls listener(ids of changed rows) now, if there is something to show, and at every change. Returns the
  // function that ends it.
  board.watchRuns = (listener) => {
    listeners.add(listener);
    if (board.store.version !== null)
      queueMicrotask(() => listeners.has(listener) && listener([...board.store.rows.keys()]));
    if (timer === null && !(window.glmtunerStatic && board.store.version !== null)) ask();
    return () => listeners.delete(listener);
  };
  // asks at once, after something was started, stopped or deleted
  board.refresh = () => ask();

  // the folder's time now, by its own clock and not by the browser's
  board.now = () =>
    board.store.time === null ? Date.now() / 1000 : board.store.time + (Date.now() - board.store.received) / 1000;

  // The names of the metrics in the rows' results, those of objectives first.
  board.metricsOf = (rows) => {
    const names = new Set(
      board.store.sweeps
        .flatMap((sweep) => sweep.objective || [])
        .filter((name) => rows.some((row) => name in (row.metrics || {}))),
    );
    for (const row of rows) for (const name of Object.keys(row.metrics || {})) names.add(name);
    return [...names];
  };
  board.knobsOf = (rows) => [...new Set(rows.flatMap((row) => Object.keys(row.varied || {})))];
  board.isCost = (name) =>
    /runtime|memory|parameters|per_second|steps_per|samples_per|^epoch$|total_flos|mfu|fast_path/.test(name);
  // Whether less of a metric is better: by how its name ends, as less_is_better of config/objective.py says.
  board.isLessBetter = (name) => /(loss|runtime|perplexity|memory_gib|bits_per_byte|brier_score|parameters)$/.test(name);

  // The values of any configuration key, {id: value}: of the rows themselves where they vary in a sweep, else of
  // the board.
  board.valuesOf = async (key) => {
    const ofRows = Object.fromEntries(
      [...board.store.rows.values()].filter((row) => key in (row.varied || {})).map((row) => [row.id, row.varied[key]]),
    );
    if (Object.keys(ofRows).length === board.store.rows.size) return ofRows;
    try {
      const answer = await board.get("values", { key });
      return { ...ofRows, ...(window.glmtunerStatic ? answer[key] : answer) };
    } catch (error) {
      if (Object.keys(ofRows).length) return ofRows;
      throw error;
    }
  };
  // The keys of all runs' configurations; asked for again when there are other runs.
  let keys = null;
  let keysOf = -1;
  board.keys = () => {
    if (keysOf !== board.store.rows.size) {
      keysOf = board.store.rows.size;
      keys = board.get("keys").catch(() => board.knobsOf([...board.store.rows.values()]));
    }
    return keys;
  };
  // What runs are called on a picture: by what their sweep has varied, and by their names where they are in
  // none. Equal labels get the name as well.
  board.labels = (rows) => {
    const sweeps = new Set(rows.map((row) => row.sweep));
    const short = board.shorten(board.knobsOf(rows.filter((row) => row.sweep)));
    const value = (each) =>
      typeof each === "number" && String(each).length > 8 ? board.number(each) : board.short(board.value(each), 30);
    const label = (row) => {
      // a preset says what it is, a number needs its key
      const varied = row.sweep
        ? Object.entries(row.varied || {})
            .map(([key, each]) =>
              key.includes(".") || typeof each !== "string" ? `${short.get(key)} ${value(each)}` : value(each),
            )
            .join(", ")
        : "";
      if (!varied) return board.line(row.name);
      return sweeps.size > 1 ? `${varied} · ${board.line(row.sweep.split("/").pop())}` : board.line(varied);
    };
    const labels = new Map(rows.map((row) => [row.id, label(row)]));
    const counts = new Map();
    for (const text of labels.values()) counts.set(text, (counts.get(text) || 0) + 1);
    for (const row of rows)
      if (counts.get(labels.get(row.id)) > 1 && labels.get(row.id) !== board.line(row.name))
        labels.set(row.id, `${labels.get(row.id)} · ${board.line(row.name)}`);
    return labels;
  };
}
