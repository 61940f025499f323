"use strict";
{
  // The filter of the tables: `state:running lr>1e-4 -stage:rm "two words"`. All terms must hold.
  const pattern = /(-?)(?:([\p{L}\p{N}_.\-/]+?)(>=|<=|!=|[:=<>]))?("([^"]*)"|[^\s"]+)/gu;
  const fields = {
    state: (row) =>
      [row.state, row.mark, board.maybe("state", row.state), row.mark && board.maybe("mark", row.mark)].filter(Boolean),
    mark: (row) => row.mark,
    name: (row) => row.name,
    sweep: (row) => row.sweep,
    stage: (row) => row.stage,
    model: (row) => row.model,
    method: (row) => row.method,
    quant: (row) => row.quant,
    data: (row) => row.data,
    step: (row) => row.step,
    steps: (row) => row.steps,
    epoch: (row) => row.epoch,
    loss: (row) => row.loss ?? row.metrics?.loss,
    note: (row) => row.note,
    speed: (row) => row.tokens_per_second,
    memory: (row) => row.memory_gib,
    eta: (row) => row.eta_s,
    age: (row) => (row.started ? board.now() - row.started : null),
    id: (row) => row.id,
  };
  const aliases = {
    lr: "learning_rate",
    bs: "per_device_train_batch_size",
    rank: "lora_rank",
    seed: "trainer.seed",
    status: "state",
    dataset: "data.dataset",
  };

  // [{ not, key | null, operator, value }] of a text
  board.terms = (text) =>
    [...text.matchAll(pattern)].map(([, minus, key, operator, bare, quoted]) => ({
      not: minus === "-",
      key: key || null,
      operator: operator || ":",
      value: quoted === undefined ? bare : quoted,
    }));

  // The key that a word of the filter means among those there are: itself, one that ends so, or null.
  board.keyFor = (word, keys) => {
    const name = aliases[word] || word;
    return (
      keys.find((key) => key === name) ||
      keys.find((key) => key.endsWith(`.${name}`)) ||
      keys.find((key) => key.endsWith(`_${name}`) && word in aliases) ||
      null
    );
  };
  const distance = (a, b) => {
    let row = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i += 1) {
      const next = [i];
      for (let j = 1; j <= b.length; j += 1)
        next.push(Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)));
      row = next;
    }
    return row[b.length];
  };
  board.nearest = (word, names) =>
    names
      .map((name) => [distance(word, name), name])
      .filter(([far]) => far <= Math.max(1, word.length / 3))
      .sort(([a], [b]) => a - b)
      .map(([, name]) => name)[0];

  const holds = (actual, { operator, value }) => {
    const values = (Array.isArray(actual) ? actual : [actual]).filter((each) => each !== null && each !== undefined);
    const number = Number(value);
    return values.some((each) => {
      const own = typeof each === "number" ? each : typeof each === "string" && each.trim() !== "" ? Number(each) : NaN;
      if ([">", "<", ">=", "<="].includes(operator)) {
        if (Number.isNaN(own) || Number.isNaN(number)) return false;
        return { ">": own > number, "<": own < number, ">=": own >= number, "<=": own <= number }[operator];
      }
      const text = board.value(each).toLowerCase();
      const isSame = text === value.toLowerCase() || (value !== "" && !Number.isNaN(number) && own === number);
      return operator === ":" ? isSame || text.includes(value.toLowerCase()) : isSame;
    });
  };

  // { test(row), error } for a text; configuration keys that the rows do not have are asked of the board, hence
  // a promise.
  board.filter = async (text) => {
    const terms = board.terms(text.trim());
    const rows = [...board.store.rows.values()];
    const metrics = board.metricsOf(rows);
    const checks = [];
    for (const term of terms) {
      if (term.key === null) {
        const wanted = term.value.toLowerCase();
        checks.push(
          (row) =>
            [
              row.id,
              row.name,
              row.sweep,
              row.state,
              row.mark,
              row.note,
              row.stage,
              row.model,
              row.method,
              row.quant,
              row.data,
              JSON.stringify(row.varied || {}),
            ].some((value) => value && String(value).toLowerCase().includes(wanted)) !== term.not,
        );
        continue;
      }
      let valueOf = fields[aliases[term.key] || term.key];
      if (!valueOf) {
        const metric =
          metrics.find((name) => name === term.key) || metrics.find((name) => name.endsWith(`_${term.key}`));
        const key = metric
          ? null
          : board.keyFor(term.key, [...new Set([...board.knobsOf(rows), ...(await board.keys())])]);
        if (metric) valueOf = (row) => row.metrics?.[metric];
        else if (key) {
          const values = await board.valuesOf(key);
          valueOf = (row) => values[row.id];
        } else {
          const near = board.nearest(term.key, [
            ...Object.keys(fields),
            ...Object.keys(aliases),
            ...metrics,
            ...(await board.keys()).flatMap((name) => [name, name.split(".").pop()]),
          ]);
          return {
            test: () => true,
            error: board.word(near ? "noSuchKeyNear" : "noSuchKey", { key: board.line(term.key), near }),
          };
        }
      }
      if ([">", "<", ">=", "<="].includes(term.operator) && Number.isNaN(Number(term.value))) {
        return {
          test: () => true,
          error: board.word("noNumber", { value: board.line(term.value), operator: term.operator }),
        };
      }
      if (term.operator === "!=") checks.push((row) => !holds(valueOf(row), { ...term, operator: "=" }) !== term.not);
      else checks.push((row) => holds(valueOf(row), term) !== term.not);
    }
    return { test: (row) => checks.every((check) => check(row)), error: null };
  };
}
