// --- the table of layers ---------------------------------------------------------------------------------------------

const ROWS_A_PAGE = 25;

// What several passes said of one layer is folded away behind their names: a row stays a line or two.
const sentences = (text) => {
  const parts = text.split("\n").filter(Boolean);
  if (parts.length < 2) return parts;
  const [details, summary, list] = ["details", "summary", "ul"].map((name) => document.createElement(name));
  summary.textContent = Array.from(new Set(parts.map((part) => part.split(":")[0]))).join(", ");
  for (const part of parts) list.append(Object.assign(document.createElement("li"), { textContent: part }));
  details.append(summary, list);
  return [details];
};

const layers = () => {
  const { columns, texts, rows } = data.layers;
  if (!rows.length) return;
  const place = (key) => columns.findIndex((column) => column.key === key);
  const isText = (column) => column.kind === "text";
  const most = columns.map((column, index) => (isText(column) ? 0 : rows.reduce((top, row) => (row[index] < INFINITE ? Math.max(top, row[index]) : top), 0)));
  // Bytes before and after share a scale, and so do times, so that their bars can be compared.
  const together = (kind) => Math.max(...columns.map((column, index) => (column.kind === kind ? most[index] : 0)));
  const scales = { bytes: together("bytes"), time: together("time"), share: 1, decibels: 0, bits: 0, whole: 0 };
  const details = new Map(data.layers.details.map(([number, panel]) => [rows[number], panel]));
  const lower = texts.map((text) => text.toLowerCase());
  const state = { key: data.layers.sort, descending: true, page: 0, shown: rows, open: null, button: null };

  const close = () => {
    const button = state.button;
    byId("panel").closest("tr").remove();
    dropCharts();
    button.setAttribute("aria-expanded", "false");
    button.removeAttribute("aria-controls");
    Object.assign(state, { open: null, button: null });
    return button;
  };

  const open = (row, button) => {
    if (state.open) close();
    Object.assign(state, { open: row, button });
    const model = place("model") < 0 ? "" : `, ${texts[row[place("model")]]}`;
    const line = PANEL.row(`${texts[row[0]]}${model}`, details.get(row), columns.length, () => close().focus());
    button.closest("tr").after(line);
    button.setAttribute("aria-expanded", "true");
    button.setAttribute("aria-controls", "panel");
    for (const figure of line.querySelectorAll("figure[data-chart]")) drawOne(figure);
  };

  const toggle = (row, button) => (state.open === row ? close() : open(row, button));

  const opener = (row, name) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "opener" });
    button.append(...breakable(name));
    button.setAttribute("aria-expanded", "false");
    return button;
  };

  const cell = (row, column, index) => {
    const element = document.createElement(index === 0 ? "th" : "td");
    element.dataset.column = column.key;
    if (index === 0) element.scope = "row";
    if (isText(column)) {
      const told = column.key === "done" || column.key === "left";
      element.className = told ? "text told" : `text ${column.key}`;
      if (told) element.append(...sentences(texts[row[index]]));
      else if (index === 0 && details.has(row)) element.append(opener(row, texts[row[index]]), ...graphButtons(texts[row[index]]));
      else if (index === 0) element.append(...breakable(texts[row[index]]), ...graphButtons(texts[row[index]]));
      else element.textContent = texts[row[index]];
      return element;
    }
    element.className = "number";
    const value = row[index];
    element.textContent = value === null ? "-" : WORDS[column.kind](value);
    const scale = column.kind in scales ? scales[column.kind] : most[index];
    if (value !== null && scale > 0) {
      const meter = document.createElement("span");
      meter.className = `meter ${column.kind}`;
      meter.setAttribute("aria-hidden", "true");
      meter.style.width = `${Math.min(100, (100 * value) / scale)}%`;
      element.append(meter);
    }
    return element;
  };

  const show = () => {
    const pages = Math.max(1, Math.ceil(state.shown.length / ROWS_A_PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const from = state.page * ROWS_A_PAGE;
    const visible = state.shown.slice(from, from + ROWS_A_PAGE);
    byId("table").tBodies[0].replaceChildren(
      ...visible.map((row) => {
        const line = document.createElement("tr");
        line.append(...columns.map((column, index) => cell(row, column, index)));
        const button = line.querySelector(".opener");
        if (button) {
          line.className = "opens";
          // Anywhere on the row will do, but where something else can be pressed, or text is being marked.
          line.addEventListener("click", (event) => {
            const other = event.target.closest("summary, .told details, a, button:not(.opener)");
            if (!other && (event.target.closest(".opener") || window.getSelection().isCollapsed)) toggle(row, button);
          });
        }
        return line;
      }),
    );
    const reopened = state.open;
    Object.assign(state, { open: null, button: null });
    dropCharts();
    const at = visible.indexOf(reopened);
    if (at >= 0) open(reopened, byId("table").tBodies[0].rows[at].querySelector(".opener"));
    const total = rows.length.toLocaleString("en");
    const count = state.shown.length.toLocaleString("en");
    byId("count").textContent = visible.length ? `Rows ${from + 1} to ${from + visible.length} of ${count}${count === total ? "" : ` found in ${total}`}` : `None of ${total} rows fits`;
    byId("page").textContent = `Page ${state.page + 1} of ${pages}`;
    for (const name of ["first", "previous"]) byId(name).disabled = state.page === 0;
    for (const name of ["following", "last"]) byId(name).disabled = state.page === pages - 1;
    for (const header of byId("table").tHead.rows[0].cells) {
      const sorted = header.dataset.key === state.key;
      if (sorted) header.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      else header.removeAttribute("aria-sort");
      header.querySelector(".arrow").textContent = sorted ? (state.descending ? " \u25bc" : " \u25b2") : "";
    }
  };

  const order = () => {
    const index = place(state.key);
    if (index < 0) return;
    const sign = state.descending ? -1 : 1;
    const ranks = isText(columns[index]) ? texts.map((_, number) => number).sort((a, b) => (lower[a] < lower[b] ? -1 : lower[a] > lower[b] ? 1 : 0)).reduce((found, number, rank) => { found[number] = rank; return found; }, []) : null;
    const value = (row) => (ranks ? ranks[row[index]] : row[index]);
    state.shown.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null); // what is not known comes last, either way
      return sign * (a - b);
    });
  };

  const update = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    // "all", a column that must say something, or column=what it must say
    const [key, ...rest] = byId("filter").value.split("=");
    const [wanted, value] = [place(key), rest.join("=")];
    const kept = (row) => key === "all" || (wanted >= 0 && (value ? texts[row[wanted]] === value : texts[row[wanted]] !== ""));
    const fits = (row) => words.every((word) => columns.some((column, index) => isText(column) && lower[row[index]].includes(word)));
    state.shown = rows.filter((row) => kept(row) && fits(row));
    state.page = 0;
    order();
    show();
  };

  const head = document.createElement("tr");
  for (const column of columns) {
    const header = document.createElement("th");
    const button = document.createElement("button");
    const arrow = document.createElement("span");
    header.scope = "col";
    Object.assign(header.dataset, { key: column.key, column: column.key });
    header.className = isText(column) ? "" : "number";
    button.type = "button";
    button.textContent = column.title;
    arrow.className = "arrow";
    arrow.setAttribute("aria-hidden", "true");
    button.append(arrow);
    button.addEventListener("click", () => {
      state.descending = state.key === column.key ? !state.descending : !isText(column);
      state.key = column.key;
      state.page = 0;
      order();
      show();
    });
    header.append(button);
    head.append(header);
  }
  byId("table").tHead.append(head);
  byId("table").tBodies[0].addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.open) close().focus();
  });
  byId("search").addEventListener("input", update);
  byId("filter").addEventListener("change", update);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  const turn = (name, page) => byId(name).addEventListener("click", () => { state.page = page(); show(); });
  turn("first", () => 0);
  turn("previous", () => state.page - 1);
  turn("following", () => state.page + 1);
  turn("last", () => Infinity);
  update();
};
layers();
