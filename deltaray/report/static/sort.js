// Tables of class "sortable": a click on a column's title sorts by it, a second one the other way round.
"use strict";
(() => {
  function keyOf(row, column) {
    const text = row.children[column].dataset.key;
    const value = Number(text.replace("inf", "Infinity"));
    return text !== "" && !Number.isNaN(value) ? value : text;
  }

  function compared(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.className = "sorter";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") !== "descending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((one, other) => compared(keyOf(one, column), keyOf(other, column)) * (falling ? -1 : 1));
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
