"use strict";
{
  // A table that is sorted by its headings and updated in place, so that focus, selection and scroll place stay.

  // columns: [{ key, title, text(row) -> string, make(row) -> node | [nodes] (else the text), sort(row) ->
  // value, isNumber, help, first }] A cell is made again when its text has changed. rows may hold { heading, id,
  // columns: {key: text}, toggle, isOpen } for groups.
  board.table = ({ caption, columns, sort, onsort, rowAttributes = () => ({}), className = "", limit = 500 }) => {
    const shown = new Map();
    const head = board.h("tr");
    const body = board.h("tbody");
    const more = board.h("button", {
      type: "button",
      hidden: true,
      onclick: () => {
        limit += 500;
        update(last);
      },
    });
    const box = board.h(
      "div",
      { class: `scroll ${className}`, tabindex: "0", role: "region", "aria-label": board.word("tableOf", { caption }) },
      board.h("table", {}, board.h("caption", { class: "hidden" }, caption), board.h("thead", {}, head), body),
    );
    let last = [];

    const heading = (column) => {
      const isSorted = sort && sort.key === column.key;
      const attributes = {
        scope: "col",
        class:
          [column.isNumber ? "number" : "", column.first ? "first" : "", column.className || ""].join(" ").trim() ||
          null,
        title: column.help || null,
      };
      if (!column.sort) return board.h("th", attributes, column.head ? column.head() : column.title);
      if (isSorted) attributes["aria-sort"] = sort.isDown ? "descending" : "ascending";
      return board.h(
        "th",
        { ...attributes, "data-key": column.key },
        board.h(
          "button",
          { type: "button", class: "sort", onclick: () => sortBy(column) },
          column.title,
          board.h("span", { "aria-hidden": "true" }, isSorted ? (sort.isDown ? " ▼" : " ▲") : ""),
        ),
      );
    };
    const drawHead = () => {
      const focused = document.activeElement?.closest?.("th")?.dataset.key;
      const hasFocus = head.contains(document.activeElement);
      board.fill(head, columns.map(heading));
      if (hasFocus)
        [...head.children]
          .find((th) => th.dataset.key === focused)
          ?.querySelector("button")
          ?.focus();
    };
    const sortBy = (column) => {
      const isSame = sort && sort.key === column.key;
      if (isSame && sort.isDown === Boolean(column.isNumber)) sort = { key: column.key, isDown: !sort.isDown };
      else if (isSame) sort = null;
      else sort = { key: column.key, isDown: Boolean(column.isNumber) };
      drawHead();
      if (onsort) onsort(sort);
      update(last);
    };

    const draw = (item) => {
      let entry = shown.get(item.id);
      if (!entry) {
        entry = { element: board.h("tr"), texts: [], cells: [], columns: null };
        shown.set(item.id, entry);
      }
      for (const [name, value] of Object.entries(
        item.heading === undefined ? rowAttributes(item) : { class: "group" },
      )) {
        if (value === null || value === undefined) entry.element.removeAttribute(name);
        else if (entry.element.getAttribute(name) !== String(value)) entry.element.setAttribute(name, value);
      }
      if (entry.columns !== columns) {
        entry.columns = columns;
        entry.texts = [];
        entry.cells = columns.map((column) =>
          board.h(column.isRowHeader ? "th" : "td", {
            scope: column.isRowHeader ? "row" : null,
            class:
              [column.isNumber ? "number" : "", column.first ? "first" : "", column.className || ""].join(" ").trim() ||
              null,
          }),
        );
        entry.element.replaceChildren(...entry.cells);
      }
      columns.forEach((column, place) => {
        const isHeading = item.heading !== undefined;
        const text = isHeading
          ? column.isRowHeader
            ? `${item.heading} ${item.isOpen}`
            : item.columns[column.key] || ""
          : column.text(item);
        if (entry.texts[place] === text) return;
        entry.texts[place] = text;
        const content = isHeading ? (column.isRowHeader ? toggle(item) : text) : column.make ? column.make(item) : text;
        refill(entry.cells[place], content);
      });
      return entry.element;
    };
    // what has the focus in a cell has it in the new content, too
    const refill = (cell, content) => {
      const focusable = () => [...cell.querySelectorAll("a, button, input")];
      const index = focusable().indexOf(document.activeElement);
      board.fill(cell, content);
      if (index >= 0) focusable()[index]?.focus({ preventScroll: true });
    };
    const toggle = (item) =>
      board.h(
        "button",
        { type: "button", class: "sort", "aria-expanded": String(item.isOpen), onclick: item.toggle },
        item.isOpen ? "▾ " : "▸ ",
        item.heading,
      );

    // the rows as they are given; `sorted` puts rows in the order that the headings ask for
    const update = (items) => {
      last = items;
      const ordered = onsort ? items : sorted(items);
      const visible = ordered.slice(0, limit);
      const focused = body.contains(document.activeElement) ? document.activeElement : null;
      const kept = new Set(visible.map((item) => item.id));
      for (const [id, entry] of shown) {
        if (kept.has(id)) continue;
        entry.element.remove();
        shown.delete(id);
      }
      visible.forEach((item, place) => {
        const element = draw(item);
        if (body.children[place] !== element) body.insertBefore(element, body.children[place] || null);
      });
      if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
      more.hidden = ordered.length <= limit;
      more.textContent = board.word("showMore", { n: visible.length, all: ordered.length });
    };
    const sorted = (items) => {
      const column = sort && columns.find((each) => each.key === sort.key);
      return column ? board.sorted(items, column.sort, sort.isDown) : items;
    };
    drawHead();
    return {
      element: board.h("div", {}, box, more),
      update,
      setColumns: (next) => {
        columns = next;
        drawHead();
        update(last);
      },
      get columns() {
        return columns;
      },
      get sort() {
        return sort;
      },
      // what is seen, as rows of texts
      texts: () => [
        columns.map((column) => column.title),
        ...(onsort ? last : sorted(last))
          .filter((item) => item.heading === undefined)
          .map((item) => columns.map((column) => (column.plain || column.text)(item))),
      ],
    };
  };

  // The items by a value: numbers by size, texts by the alphabet, what has no value last in both directions.
  board.sorted = (items, valueOf, isDown) => {
    const isMissing = (value) => value === null || value === undefined || value === "" || Number.isNaN(value);
    const compared = (a, b) => {
      if (typeof a === "number" && typeof b === "number") return a - b;
      return String(a).localeCompare(String(b), undefined, { numeric: true });
    };
    return items
      .map((item, place) => [valueOf(item), place, item])
      .sort(([a, i], [b, j]) => {
        if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b) || i - j;
        return (isDown ? compared(b, a) : compared(a, b)) || i - j;
      })
      .map(([, , item]) => item);
  };

  // a table of texts under a heading; cells with texts of models keep their line breaks
  board.plainTable = (caption, header, rows, isText = false) =>
    board.h(
      "div",
      { class: isText ? "scroll texts" : "scroll", tabindex: "0", role: "region", "aria-label": caption },
      board.h(
        "table",
        {},
        board.h("caption", { class: "hidden" }, caption),
        board.h(
          "thead",
          {},
          board.h(
            "tr",
            {},
            header.map((title) => (title === "" ? board.h("td") : board.h("th", { scope: "col" }, board.line(title)))),
          ),
        ),
        board.h(
          "tbody",
          {},
          rows.map((row) =>
            board.h(
              "tr",
              {},
              row.map((value) => board.h("td", {}, value instanceof Node ? value : board.visible(value ?? ""))),
            ),
          ),
        ),
      ),
    );
}
