// Tables that sort by a column, and show the rows in which some text occurs. Without scripts the page is complete.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], rows = [...body.rows];
  const number = (text) => parseFloat(text.replace("−", "-").replaceAll(",", ""));
  const compared = (a, b) => (Number.isNaN(number(a)) || Number.isNaN(number(b))
    ? a.localeCompare(b, undefined, { numeric: true }) : number(a) - number(b));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent.trim();
      rows.sort((a, b) => (falling ? -1 : 1) * compared(text(a), text(b)));
      body.append(...rows);
    });
  });
  if (rows.length < 20) continue;
  const label = document.createElement("label"), search = document.createElement("input");
  search.type = "search";
  label.append("Show rows with ", search);
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(label);
}
