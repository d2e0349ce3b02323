// Sorts tables of class "sortable" by the column whose heading is chosen; a second time the other way round.
"use strict";
(() => {
  function key(cell) {
    const text = (cell.dataset.sort ?? cell.textContent).trim().replaceAll(",", "").replace("\u2212", "-");
    const number = Number(text.replace("inf", "Infinity"));
    return text !== "" && !Number.isNaN(number) ? number : text;
  }

  function before(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b));
  }

  function sort(table, column, heading) {
    const body = table.tBodies[0];
    const upwards = heading.getAttribute("aria-sort") === "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const rows = [...body.rows].sort((a, b) => before(key(a.cells[column]), key(b.cells[column])));
    body.append(...(upwards ? rows : rows.reverse()));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const label = document.createElement("button");
      label.type = "button";
      label.className = "sort";
      label.append(...heading.childNodes);
      label.addEventListener("click", () => sort(table, column, heading));
      heading.append(label);
    });
  }
})();
