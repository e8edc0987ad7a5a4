// The comparison table: sort by any column, open trials, copy for a spreadsheet. The page reads well without it.
"use strict";
(() => {
  document.documentElement.classList.add("js");
  const table = document.getElementById("comparison");
  if (!table) return;
  const bodies = () => [...table.tBodies];
  const headers = [...table.tHead.rows[1].cells];

  const valueOf = (cell, textual) => {
    const raw = cell.dataset.value;
    if (textual) return raw;
    if (raw === "") return null;
    return raw === "inf" ? Infinity : Number(raw);
  };
  const sortBy = (column, header) => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const textual = header.dataset.type === "text";
    const keyed = bodies().map((body) => [valueOf(body.rows[0].cells[column], textual), body]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what says nothing goes last, either way
      const order = textual ? a.localeCompare(b) : a === b ? 0 : a < b ? -1 : 1;
      return descending ? -order : order;
    });
    keyed.forEach(([, body]) => table.append(body));
  };
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => sortBy(column, header));
  });

  const open = (body, wanted) => {
    const button = body.querySelector("button.opens");
    if (!button) return;
    button.setAttribute("aria-expanded", String(wanted));
    [...body.rows].slice(1).forEach((row) => { row.hidden = !wanted; });
  };
  bodies().forEach((body) => {
    open(body, false);
    const button = body.querySelector("button.opens");
    if (button) button.addEventListener("click", () => open(body, button.getAttribute("aria-expanded") !== "true"));
  });
  const all = document.querySelector("button[data-opens]");
  all.hidden = !table.querySelector("button.opens");
  all.addEventListener("click", () => {
    const wanted = all.getAttribute("aria-expanded") !== "true";
    all.setAttribute("aria-expanded", String(wanted));
    all.textContent = wanted ? "Hide all trials" : "Show all trials";
    bodies().forEach((body) => open(body, wanted));
  });

  const asText = () => {
    const title = (header) => {
      const name = header.querySelector("button").textContent;
      return header.dataset.unit ? `${name} (${header.dataset.unit})` : name;
    };
    const sample = table.tBodies[0].rows[0].cells;
    const spread = (cells, plain, ends) =>
      [...cells].flatMap((cell, i) => ("low" in sample[i].dataset ? [plain(cell), ...ends(cell)] : [plain(cell)]));
    const lines = [spread(headers, title, (header) => [`${title(header)} low`, `${title(header)} high`])];
    bodies().forEach((body) => [...body.rows].forEach((row) => {
      if (!row.hidden) lines.push(spread(row.cells, (cell) => cell.dataset.value, (cell) => [cell.dataset.low, cell.dataset.high]));
    }));
    return lines.map((line) => line.map((text) => text.replace(/\s+/g, " ")).join("\t")).join("\n");
  };
  const copyByHand = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  const status = document.getElementById("copied");
  document.querySelector("button[data-copies]").addEventListener("click", async () => {
    const text = asText();
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      done = copyByHand(text);
    }
    status.textContent = done ? "Copied: paste it into a spreadsheet." : "This browser does not let the page copy.";
  });
})();
