"use strict";

// Tables are sorted by a click on a column's heading, and the other way round by the next one.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = heading.classList.contains("number")
      ? (a, b) => Number(value(a)) - Number(value(b))
      : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(descending ? rows.reverse() : rows));
    });
  });
}

// The cell of a confusion matrix under the pointer is read out below it.
const words = JSON.parse(document.querySelector("main").dataset.words);
for (const matrix of document.querySelectorAll("svg.matrix")) {
  const size = words.length;
  const counts = new Map(JSON.parse(matrix.dataset.counts).map(([i, j, n]) => [i * size + j, n]));
  const reading = matrix.closest("figure").querySelector(".reading");
  reading.textContent = "Point at a cell to read it.";
  const picture = matrix.querySelector("image");
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const row = Math.min(size - 1, Math.floor(((event.clientY - box.top) / box.height) * size));
    const column = Math.min(size - 1, Math.floor(((event.clientX - box.left) / box.width) * size));
    const count = counts.get(row * size + column) ?? 0;
    reading.textContent = `${words[row]}, predicted as ${words[column]}: ${count} ${count === 1 ? "image" : "images"}`;
  });
}
