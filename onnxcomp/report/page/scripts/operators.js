// --- the chart of operators ------------------------------------------------------------------------------------------

// Each operator has two bars, in the colour of its kind. The kind and the change are told in letters too.
const operatorChart = (chart) => {
  const { bars, kinds } = chart;
  const narrow = window.innerWidth < 640;
  const colours = bars.map(([, kind]) => colour(`kind-${kind}`));
  const side = (label, place, fill) => ({
    label,
    data: bars.map((bar) => bar[place]),
    backgroundColor: fill ? colours : "transparent",
    borderColor: colours,
    borderWidth: 1.5,
    borderSkipped: false,
    barThickness: 11,
  });
  const cut = (name) => (narrow && name.length > 18 ? `${name.slice(0, 17)}\u2026` : name);
  const label = ([name, kind, , , change]) => [cut(name), [narrow ? "" : kinds[kind], change].filter(Boolean).join(", ")].filter(Boolean);
  return {
    type: "bar",
    height: 50 + 36 * bars.length,
    data: { labels: bars.map(label), datasets: [side("before", 2, false), side("after", 3, true)] },
    options: {
      indexAxis: "y",
      scales: {
        x: axis("nodes", { beginAtZero: true, ticks: { color: colour("soft"), precision: 0 } }),
        y: axis("", { ticks: { color: colour("text"), autoSkip: false, font: { size: 11 } }, grid: { display: false } }),
      },
      plugins: {
        legend: { display: false },
        tooltip: { callbacks: { title: ([item]) => bars[item.dataIndex][0], label: (item) => `${item.raw.toLocaleString("en")} ${item.dataset.label} (${kinds[bars[item.dataIndex][1]]})` } },
      },
    },
  };
};
