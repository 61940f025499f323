"use strict";
// The words of the page in English and Chinese. `board.say({...})` adds those of a view; a test holds that both languages have the same.
board.say = (english, chinese) => {
  board.words.en = { ...board.words.en, ...english };
  board.words.zh = { ...board.words.zh, ...chinese };
};
board.language = board.setting("language", navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
// board.word("left", { n: 3 }) puts 3 in place of {n}
board.word = (name, values = {}) => {
  const text = board.words[board.language][name];
  if (text === undefined) throw new Error(`no word ${name}`);
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
};
board.say(
  {
    skip: "Skip to the content", runs: "Runs", curves: "Curves", start: "Start", talk: "Talk", language: "中文", theme: "Theme",
    light: "Light", dark: "Dark", system: "As the system", lost: "The board cannot be reached.",
    notStatic: "The static version does not have this: open the folder with python -m glmtuner board.", unknownPage: "There is no such page.",
  },
  {
    skip: "跳到内容", runs: "运行", curves: "曲线", start: "新建", talk: "对话", language: "English", theme: "主题",
    light: "浅色", dark: "深色", system: "跟随系统", lost: "无法连接看板。",
    notStatic: "静态页面没有这部分内容：请用 python -m glmtuner board 打开该文件夹。", unknownPage: "没有这个页面。",
  },
);
