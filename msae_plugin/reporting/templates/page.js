// Without scripts the tables are as they were written, and the figures whole.
"use strict";
// Sorting: a button in each column heading.
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

// Figures: the nearest value under the pointer, and a legend that shows and hides its series.
for (const figure of document.querySelectorAll("figure")) {
  const drawing = figure.querySelector(".drawing");
  const svg = drawing.querySelector("svg");
  const points = JSON.parse(figure.querySelector("script").textContent);
  const hidden = new Set();
  const told = document.createElement("output");
  told.hidden = true;
  drawing.append(told);
  drawing.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let [nearest, least] = [null, 18];
    for (const point of points) {
      const distance = Math.hypot(point[1] - x, point[2] - y);
      if (distance < least && !hidden.has(point[0])) [nearest, least] = [point, distance];
    }
    told.hidden = nearest === null;
    if (nearest === null) return;
    told.textContent = nearest[3];
    told.style.top = `${nearest[2] / scale + 8}px`;
    const room = drawing.clientWidth - told.offsetWidth;
    told.style.left = `${Math.max(0, Math.min(nearest[1] / scale + 8, room))}px`;
  });
  drawing.addEventListener("pointerleave", () => { told.hidden = true; });
  const entries = Array.from(svg.querySelectorAll("g.legend"));
  for (const entry of entries) {
    const series = entry.dataset.series;
    const toggle = () => {
      const number = Number(series);
      if (!hidden.delete(number)) hidden.add(number);
      const off = hidden.has(number);
      for (const part of svg.querySelectorAll(`[data-series="${series}"]`)) {
        if (part.classList.contains("legend")) part.classList.toggle("off", off);
        else part.style.display = off ? "none" : "";
      }
      for (const each of entries) {
        if (each.dataset.series === series) each.setAttribute("aria-pressed", String(!off));
      }
      told.hidden = true;
    };
    entry.addEventListener("click", toggle);
    if (!entry.querySelector("text")) continue;
    entry.setAttribute("role", "button");
    entry.setAttribute("tabindex", "0");
    entry.setAttribute("aria-pressed", "true");
    entry.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      toggle();
    });
  }
}
