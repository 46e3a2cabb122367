"use strict";
// Everything that is shown comes out of the JSON in #data, and is put in as text: nothing in it is read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// --- numbers in words ------------------------------------------------------------------------------------------------

const scaled = (value, units) => {
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = unit === 0 || Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
  return value.toFixed(digits) + units[unit];
};
const percent = (value) => (value === 0 ? "0%" : value < 1e-4 ? "<0.01%" : `${(100 * value).toFixed(2)}%`);
const WORDS = {
  bytes: (value) => scaled(value, [" B", " kB", " MB", " GB", " TB"]),
  count: (value) => scaled(value, ["", " k", " M", " G", " T"]),
  share: (value) => `${(100 * value).toFixed(1)}%`,
  error: percent,
};

// --- charts ----------------------------------------------------------------------------------------------------------

const VERDICTS = { kept: "good-mark", forced: "warn-mark", dropped: "bad-mark", unchanged: "mark", skipped: "mark" };
const LINES = ["#3b82c4", "#d97a1f", "#3a9e5c", "#c9504a", "#8a6fc7", "#9a7256", "#cf6fae", "#808a94", "#a3a030", "#2aa3b0"];
const DASHES = [[], [6, 3], [2, 2]];

// Points that lie on one another are told as one, with their number.
const grouped = (items) => {
  const counts = new Map();
  for (const item of items) {
    const text = `${item.raw.label}: ${item.raw.told}`;
    counts.set(text, (counts.get(text) || 0) + 1);
  }
  const texts = Array.from(counts.keys());
  const shown = texts.slice(0, 6);
  return texts.length > shown.length ? [...shown, `and ${texts.length - shown.length} more`] : shown;
};

const scatterSets = (chart) => {
  const top = chart.top === null ? Infinity : chart.top;
  const points = chart.points.map(([x, y, label, told, kept]) => ({ x, y: Math.min(y, top), label, told, kept, cut: y > top }));
  const xs = [1, ...points.map((point) => point.x), ...(chart.result ? [chart.result[0]] : [])];
  const sets = [
    { label: "kept", data: points.filter((point) => point.kept), backgroundColor: colour("good-mark"), borderColor: colour("text"), borderWidth: 1, pointRadius: 7, pointHoverRadius: 9, order: 2 },
    { label: "not kept", data: points.filter((point) => !point.kept), backgroundColor: "transparent", borderColor: colour("bad-mark"), borderWidth: 2, pointStyle: (context) => (context.raw && context.raw.cut ? "triangle" : "circle"), pointRadius: 5, pointHoverRadius: 7, order: 3 },
    { label: "original", data: [{ x: 1, y: 0, label: "the original", told: "1.00x, no loss" }], backgroundColor: colour("text"), pointStyle: "rectRot", pointRadius: 6, order: 4 },
  ];
  if (chart.result) {
    const [x, y] = chart.result;
    sets.push({ label: "result, confirmed", data: [{ x, y: Math.min(y, top), label: "the result", told: `${x.toFixed(2)}x, ${y.toPrecision(3)} on samples that no choice saw` }], backgroundColor: "transparent", borderColor: colour("accent"), borderWidth: 3, pointStyle: "star", pointRadius: 10, pointHoverRadius: 12, order: 1 });
  }
  sets.push({ label: "not beaten in both", type: "line", data: chart.front.map(([x, y]) => ({ x, y: Math.min(y, top) })), borderColor: colour("mark"), borderWidth: 1.5, pointStyle: "line", pointRadius: 0, pointHitRadius: 0, order: 6 });
  if (chart.budget !== null) {
    const [low, high] = [Math.min(...xs), Math.max(...xs)];
    sets.push({ label: `budget ${chart.budget}`, type: "line", data: [{ x: low, y: chart.budget }, { x: high, y: chart.budget }], borderColor: colour("warn-mark"), borderWidth: 2, borderDash: [6, 4], pointStyle: "line", pointRadius: 0, pointHitRadius: 0, order: 5 });
  }
  return sets;
};

const axis = (title, more) => ({ title: { display: Boolean(title), text: title, color: colour("soft") }, ticks: { color: colour("soft") }, grid: { color: colour("line") }, ...more });
const legend = () => ({ position: "bottom", labels: { color: colour("text"), usePointStyle: true, boxHeight: 7 } });

const CHARTS = {
  candidates: (chart, hint) => {
    const cut = chart.top === null ? 0 : chart.points.filter((point) => point[1] > chart.top).length;
    hint.textContent = cut ? `${cut} with more than ${chart.top.toPrecision(2)} ${cut > 1 ? "are" : "is"} drawn at the upper edge, as a triangle.` : "";
    return {
      type: "scatter",
      data: { datasets: scatterSets(chart) },
      options: {
        scales: { x: axis(chart.x, { grace: "8%" }), y: axis(chart.y, { grace: "8%" }) },
        plugins: { legend: legend(), tooltip: { callbacks: { title: () => "", beforeBody: grouped, label: () => "" } } },
      },
    };
  },
  time: () => {
    const stages = Array.from(new Set(data.time.map((bar) => bar.stage)));
    const used = Object.keys(VERDICTS).filter((verdict) => data.time.some((bar) => bar.verdict === verdict));
    return {
      type: "bar",
      height: 90 + 34 * stages.length,
      data: {
        labels: stages,
        datasets: used.map((verdict) => ({
          label: verdict,
          data: data.time.filter((bar) => bar.verdict === verdict).map((bar) => ({ x: [bar.start, bar.end], y: bar.stage, text: bar.text })),
          backgroundColor: colour(VERDICTS[verdict]),
          borderColor: colour("back"),
          borderWidth: { left: 1, right: 1 },
          borderSkipped: false,
          minBarLength: 3,
          grouped: false,
          barThickness: 16,
        })),
      },
      options: {
        indexAxis: "y",
        scales: { x: axis("seconds", { beginAtZero: true }), y: axis("", { ticks: { color: colour("text"), autoSkip: false }, grid: { display: false } }) },
        plugins: { legend: legend(), tooltip: { callbacks: { label: (item) => item.raw.text } } },
      },
    };
  },
  curves: (chart) => ({
    type: "line",
    data: {
      datasets: chart.lines.map((line, index) => ({
        label: line.name,
        data: line.points.map(([x, y]) => ({ x, y })),
        borderColor: LINES[index % LINES.length],
        backgroundColor: LINES[index % LINES.length],
        borderDash: DASHES[index % DASHES.length],
        borderWidth: 2,
        pointRadius: 3,
      })),
    },
    options: { scales: { x: axis(chart.x, { type: "linear" }), y: axis(chart.y) }, plugins: { legend: legend() } },
  }),
};

const drawn = [];
// How many marks there are, for those who check the page.
const counted = (chart) => chart.data.datasets.reduce((sum, _, index) => sum + chart.getDatasetMeta(index).data.filter((mark) => !mark.skip && Number.isFinite(mark.x) && Number.isFinite(mark.y)).length, 0);

const draw = () => {
  while (drawn.length) drawn.pop().destroy();
  Object.assign(Chart.defaults, { animation: false, responsive: true, maintainAspectRatio: false });
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const { chart: kind, index } = figure.dataset;
    const { height, ...config } = CHARTS[kind](data[kind][Number(index)], figure.querySelector(".hint"));
    const canvas = figure.querySelector("canvas");
    if (height) canvas.parentElement.style.height = `${height}px`;
    const chart = new Chart(canvas, config);
    drawn.push(chart);
    canvas.dataset.marks = String(counted(chart));
  }
};
draw();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
// Paper is white: charts are drawn again in the light colours, and back afterwards.
const onPaper = (paper) => () => {
  document.documentElement.toggleAttribute("data-paper", paper);
  draw();
};
window.addEventListener("beforeprint", onPaper(true));
window.addEventListener("afterprint", onPaper(false));

// --- the table of layers ---------------------------------------------------------------------------------------------

const ROWS_A_PAGE = 25;

// Names of nodes are paths: lines may break behind a slash before they break anywhere.
const breakable = (text) => text.split(/(?<=[/.])/).flatMap((part) => [part, document.createElement("wbr")]);

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
  const most = columns.map((column, index) => (isText(column) ? 0 : rows.reduce((top, row) => Math.max(top, row[index] || 0), 0)));
  // Bytes before and after share a scale, so that their bars can be compared.
  const bytes = Math.max(...columns.map((column, index) => (column.kind === "bytes" ? most[index] : 0)));
  const lower = texts.map((text) => text.toLowerCase());
  const state = { key: data.layers.sort, descending: true, page: 0, shown: rows };

  const cell = (row, column, index) => {
    const element = document.createElement(index === 0 ? "th" : "td");
    if (index === 0) element.scope = "row";
    if (isText(column)) {
      const told = column.key === "done" || column.key === "left";
      element.className = told ? "text told" : `text ${column.key}`;
      if (told) element.append(...sentences(texts[row[index]]));
      else if (index === 0) element.append(...breakable(texts[row[index]]));
      else element.textContent = texts[row[index]];
      return element;
    }
    element.className = "number";
    const value = row[index];
    element.textContent = value === null ? "-" : WORDS[column.kind](value);
    const scale = column.kind === "bytes" ? bytes : column.kind === "share" ? 1 : most[index];
    if (value !== null && scale > 0) {
      const meter = document.createElement("span");
      meter.className = `meter ${column.kind}`;
      meter.setAttribute("aria-hidden", "true");
      meter.style.width = `${(100 * value) / scale}%`;
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
        return line;
      }),
    );
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
    const wanted = place(byId("filter").value);
    const fits = (row) => words.every((word) => columns.some((column, index) => isText(column) && lower[row[index]].includes(word)));
    state.shown = rows.filter((row) => (byId("filter").value === "all" || (wanted >= 0 && texts[row[wanted]] !== "")) && fits(row));
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
    header.dataset.key = column.key;
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

// --- commands --------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(code); // not allowed here: it is marked, and can be copied by hand
      button.textContent = "Marked";
    }
  });
}
document.body.dataset.ready = "yes";
