// Sorting: a button in each column heading. Without scripts the tables are as they were written.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = Array.from(table.tHead.rows[0].cells);
  if (body.rows.length < 2) continue;
  headings.forEach((heading, column) => {
    const label = heading.querySelector(".label");
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Sort by ${label.textContent}`);
    label.after(button);
    heading.classList.add("sortable");
    // A click anywhere in the heading; Enter and Space on the button arrive as clicks too.
    heading.addEventListener("click", () => {
      // Numbers begin with the largest, words with A.
      const first = heading.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const rows = Array.from(body.rows).map((row) => [row, row.cells[column].dataset.value]);
      rows.sort(([, a], [, b]) => {
        // What was not measured stays at the end.
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        const numbers = a !== "" && b !== "" && isFinite(a) && isFinite(b);
        return sign * (numbers ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...rows.map(([row]) => row));
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
    });
  });
}
