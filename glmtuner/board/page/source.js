"use strict";
// Where the page's data come from: the board that serves it, or, in the static version, scripts that were written beside it.

// The answer to GET api/<name>?<parameters>; throws an Error with the board's own paragraph.
board.get = async (name, parameters = {}) => {
  if (window.glmtunerStatic) return board.fromScript(name, parameters);
  const pairs = Object.entries(parameters).flatMap(([key, value]) => [value].flat().map((each) => [key, each])); // a list is asked for as id=a&id=b
  const query = new URLSearchParams(pairs.filter(([, value]) => value !== undefined && value !== null));
  return board.asked(`api/${name}${query.size ? `?${query}` : ""}`, {});
};

// The address that the program prints carries the token. It is kept where only this origin, port included, can read it, and is
// taken out of the address; the cookie that came with the page lets it read, and nothing more.
const token = new URLSearchParams(location.search).get("token");
if (token && !window.glmtunerStatic) {
  board.remember("token", token);
  history.replaceState(null, "", location.pathname + location.hash);
}
// The headers of a request that changes something.
board.headers = () => {
  const known = token || board.setting("token", null);
  return { "Content-Type": "application/json", "X-Glmtuner-Board": "1", ...(known ? { Authorization: `Bearer ${known}` } : {}) };
};

// The answer to a request that changes something.
board.post = (name, body = {}) =>
  board.asked(`api/${name}`, { method: "POST", headers: board.headers(), body: JSON.stringify(body) });

// An answer whose objects inherit nothing: a metric or a key may be called "constructor", and is not there unless it was sent.
const bare = (value) => {
  if (value === null || typeof value !== "object") return value;
  if (!Array.isArray(value)) Object.setPrototypeOf(value, null);
  for (const each of Array.isArray(value) ? value : Object.values(value)) if (typeof each === "object") bare(each);
  return value;
};

board.asked = async (path, options) => {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error(board.word("lost"));
  }
  const type = response.headers.get("content-type") || "";
  const content = type.startsWith("application/json") ? bare(await response.json()) : { error: await response.text() };
  if (!response.ok) throw new Error(content.error || response.statusText);
  return content;
};

// The static version: data/<name>[-<id>].js calls glmtunerData(key, content); a script works where a page from a file may fetch nothing.
const received = {};
const awaited = {};
const promised = {};
window.glmtunerData = (key, content) => {
  received[key] = bare(content);
  if (awaited[key]) awaited[key](content);
};
board.fromScript = (name, parameters) => {
  const key = window.glmtunerStatic.files[JSON.stringify([name, parameters.id || ""])];
  if (key === undefined) return Promise.reject(new Error(board.word("notStatic")));
  if (key in received) return Promise.resolve(received[key]);
  promised[key] = promised[key] || new Promise((resolve, reject) => { // several views may ask for it before it is there
    awaited[key] = resolve;
    const script = board.h("script", { src: `data/${key}.js` });
    script.onerror = () => reject(new Error(board.word("lost")));
    document.head.append(script);
  });
  return promised[key];
};
