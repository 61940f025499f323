"use strict";
{
  // The words of a command line, which the form and the command line show. Other scripts of the page take them
  // from board.commandLine.
  const state = {
    words: [],
    multirun: false,
    configDir: "",
    search: "",
    onlySet: false,
    open: new Set(["model", "data"]),
  };

  const keyOf = (word) => word.split("=")[0].replace(/^[+~]+/, "");
  const valueOf = (key) => {
    const word = state.words.findLast((each) => keyOf(each) === key && each.includes("="));
    return word === undefined ? null : word.slice(word.indexOf("=") + 1);
  };
  const setValue = (key, value) => {
    const place = state.words.findLastIndex((word) => keyOf(word) === key);
    const kept = state.words.filter((word, index) => keyOf(word) !== key || index === place);
    const at = kept.findIndex((word) => keyOf(word) === key);
    if (value === null) state.words = kept.filter((word) => keyOf(word) !== key);
    else if (at < 0) state.words = [...kept, `${key}=${value}`];
    else state.words = kept.with(at, `${key}=${value}`);
  };

  // The words of a line as a shell reads them; null where a quote is not closed.
  const split = (line) => {
    const words = [];
    let word = null;
    let quote = "";
    for (let place = 0; place < line.length; place += 1) {
      const sign = line[place];
      if (quote === "'") {
        if (sign === "'") quote = "";
        else word += sign;
      } else if (sign === "\\" && (quote === "" || '"\\$`\n'.includes(line[place + 1]))) {
        place += 1;
        if (place >= line.length) return null;
        if (line[place] !== "\n") word = (word || "") + line[place];
      } else if (quote === '"') {
        if (sign === '"') quote = "";
        else word += sign;
      } else if (sign === "'" || sign === '"') {
        quote = sign;
        word = word || "";
      } else if (/\s/.test(sign)) {
        if (word !== null) words.push(word);
        word = null;
      } else word = (word || "") + sign;
    }
    if (quote) return null;
    return word === null ? words : [...words, word];
  };
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
  const commandOf = () =>
    [
      "python",
      "-m",
      "glmtuner",
      ...(state.configDir ? ["--config-dir", state.configDir] : []),
      ...(state.multirun ? ["-m"] : []),
      ...state.words,
    ]
      .map(quoted)
      .join(" ");
  const readCommand = (line) => {
    const words = split(line);
    if (words === null) return false;
    const start = words.findIndex((word) => word === "glmtuner" || word.endsWith("/glmtuner"));
    const rest = start >= 0 && start < 4 ? words.slice(start + 1) : words;
    Object.assign(state, { words: [], multirun: false, configDir: "" });
    for (let place = 0; place < rest.length; place += 1) {
      const [name, ...value] = rest[place].split("=");
      if (["-m", "--multirun"].includes(rest[place])) state.multirun = true;
      else if (["--config-dir", "-cd"].includes(name))
        state.configDir = value.length ? value.join("=") : rest[(place += 1)] || "";
      else state.words.push(rest[place]);
    }
    return true;
  };

  // What a message proposes to type, as the words with it; null where it proposes nothing.
  const proposal = (error) => {
    if (!error.word) return null;
    const value = error.word.slice(error.word.indexOf("=") + 1);
    const key = error.message.match(/did you mean '[^']+'\? type ([\w./]+)=…/);
    if (key) return `${key[1]}=${value}`;
    const other = error.message.match(
      /(?:no \w+ named '([^']+)'|=(\S+): (?:no \w+ preset of that name|not a legal value)); did you mean '([^']+)'/,
    );
    if (!other) return null;
    const wrong = other[1] || other[2];
    return value.includes(wrong) ? `${keyOf(error.word)}=${value.replace(wrong, other[3])}` : null;
  };

  board.commandLine = { state, keyOf, valueOf, setValue, split, quoted, commandOf, readCommand, proposal };
}
