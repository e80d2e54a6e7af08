"use strict";
(() => {
  document.documentElement.classList.add("js");

  // Sorting. What is not a number comes last, either way.
  function value(row, column, numeric) {
    const text = row.cells[column].textContent;
    if (!numeric) return text;
    const number = parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? null : number;
  }
  function compare(one, other) {
    if (typeof one === "number") return one - other;
    return one.localeCompare(other, "en", { numeric: true });
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("n");
        const before = head.getAttribute("aria-sort");
        // Large numbers are what is looked for first.
        const falling = before ? before === "ascending" : numeric;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [value(row, column, numeric), row]);
        rows.sort(([one], [other]) => {
          if (one === null || other === null) return (one === null) - (other === null);
          return falling ? compare(other, one) : compare(one, other);
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
})();
