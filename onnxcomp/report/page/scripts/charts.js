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
  operators: operatorChart,
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

const drawOne = (figure) => {
  const { chart: kind, index } = figure.dataset;
  const { height, ...config } = CHARTS[kind](data[kind][Number(index)], figure.querySelector(".hint"));
  const canvas = figure.querySelector("canvas");
  if (height) canvas.parentElement.style.height = `${height}px`;
  const chart = new Chart(canvas, config);
  drawn.push(chart);
  canvas.dataset.marks = String(counted(chart));
};

// Takes away the charts of figures that are no longer on the page.
const dropCharts = () => {
  for (const chart of drawn.filter((one) => !one.canvas.isConnected)) {
    drawn.splice(drawn.indexOf(chart), 1);
    chart.destroy();
  }
};

const draw = () => {
  while (drawn.length) drawn.pop().destroy();
  Object.assign(Chart.defaults, { animation: false, responsive: true, maintainAspectRatio: false });
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
  for (const figure of document.querySelectorAll("figure[data-chart]")) drawOne(figure);
};
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
// Paper is white: charts are drawn again in the light colours, and back afterwards.
const onPaper = (paper) => () => {
  document.documentElement.toggleAttribute("data-paper", paper);
  draw();
};
window.addEventListener("beforeprint", onPaper(true));
window.addEventListener("afterprint", onPaper(false));
