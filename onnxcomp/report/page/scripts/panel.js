// --- the panel of a layer --------------------------------------------------------------------------------------------

// Its helpers are its own, so that their names are free for other parts.
const PANEL = (() => {
  const make = (name, values, ...children) => {
    const element = Object.assign(document.createElement(name), values);
    element.append(...children);
    return element;
  };
  const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
  const sharesOf = (counts) => {
    const total = counts.reduce((sum, count) => sum + count, 0) || 1;
    return counts.map((count) => count / total);
  };
  const binsOf = (chart) => (chart.before || chart.after).length;
  const edgeOf = (chart, index) => chart.low + ((chart.high - chart.low) * index) / binsOf(chart);
  const codesOf = (chart) => (chart.scale > 0 ? Math.round((chart.high - chart.low) / chart.scale) + 1 : 0);
  // A line of the grid for every eighth of the codes, so that it shows how far apart they are.
  const stepOf = (chart) => Math.max(1, Math.ceil(codesOf(chart) / 8));

  CHARTS.histogram = (chart) => {
    const labels = Array.from({ length: binsOf(chart) }, (_, index) => short((edgeOf(chart, index) + edgeOf(chart, index + 1)) / 2));
    const told = (item) => `${item.dataset.label}: ${percent(item.raw)} of its values`;
    const sets = [];
    if (chart.after) sets.push({ type: "line", label: "after", data: sharesOf(chart.after), stepped: "middle", borderColor: colour("accent"), backgroundColor: colour("accent"), borderWidth: 2, pointRadius: 0, pointHitRadius: 8, pointStyle: "line" });
    if (chart.before) sets.push({ label: "before", data: sharesOf(chart.before), backgroundColor: colour("mark"), categoryPercentage: 1, barPercentage: 1, pointStyle: "rect" });
    return {
      type: "bar",
      data: { labels, datasets: sets },
      options: {
        interaction: { mode: "index", intersect: false },
        scales: { x: axis("value", { ticks: { color: colour("soft"), maxRotation: 0, autoSkipPadding: 16 }, grid: { display: false } }), y: axis("share of the values", { ticks: { color: colour("soft"), callback: (value) => `${short(100 * value)}%` }, beginAtZero: true }) },
        plugins: { legend: legend(), tooltip: { callbacks: { label: told } } },
      },
    };
  };

  CHARTS.ranges = (chart) => {
    const bars = [["seen in the original", chart.seen_low, chart.seen_high, "mark"], ["the scale's range", chart.low, chart.high, "accent"]].filter((bar) => bar[1] !== null && bar[2] !== null);
    const ends = bars.flatMap((bar) => [bar[1], bar[2]]);
    const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
    const step = chart.scale > 0 ? stepOf(chart) * chart.scale : 0;
    const ticks = (scale) => {
      if (!step || (high - low) / step > 100) return; // a range so much wider than the scale's has lines of its own
      scale.ticks = [];
      for (let place = Math.ceil(low / step); place * step <= high; place += 1) scale.ticks.push({ value: place * step });
    };
    return {
      type: "bar",
      height: 70 + 30 * bars.length,
      data: { labels: bars.map((bar) => bar[0]), datasets: [{ data: bars.map((bar) => [bar[1], bar[2]]), backgroundColor: bars.map((bar) => colour(bar[3])), barThickness: 14, minBarLength: 2 }] },
      options: {
        indexAxis: "y",
        scales: { x: axis("", { min: low, max: high, afterBuildTicks: ticks, ticks: { color: colour("soft"), maxRotation: 0, callback: short } }), y: axis("", { ticks: { color: colour("text"), autoSkip: false }, grid: { display: false } }) },
        plugins: { legend: { display: false }, tooltip: { callbacks: { label: (item) => `${short(item.raw[0])} to ${short(item.raw[1])}` } } },
      },
    };
  };

  CHARTS.singular = (chart) => {
    const top = Math.max(...chart.values.map((point) => point[1]));
    return {
      type: "line",
      data: {
        datasets: [
          { label: "singular value", data: chart.values.map(([x, y]) => ({ x, y })), borderColor: colour("accent"), backgroundColor: colour("accent"), borderWidth: 2, pointRadius: 2 },
          { label: `rank ${chart.kept}`, data: [{ x: chart.kept, y: 0 }, { x: chart.kept, y: top }], borderColor: colour("warn-mark"), backgroundColor: colour("warn-mark"), borderWidth: 2, borderDash: [6, 4], pointRadius: 0, pointStyle: "line" },
        ],
      },
      options: {
        scales: { x: axis("number", { type: "linear", min: 1, ticks: { color: colour("soft"), precision: 0 } }), y: axis("", { beginAtZero: true }) },
        plugins: { legend: legend() },
      },
    };
  };

  // What each chart says in words, and its figures as a table.
  const TOLD = {
    histogram: (chart) => {
      const sides = ["before", "after"].filter((side) => chart[side]);
      const counted = sides.map((side) => `${chart[`${side}_values`].toLocaleString("en")} values ${side}`).join(" and ");
      const beyond = chart.least < chart.low || chart.most > chart.high;
      const ends = `From ${short(chart.least)} to ${short(chart.most)}${beyond ? "; the first and the last bar have those beyond them too" : ""}.`;
      return {
        title: sides.length > 1 ? "Weight before and after" : `Weight ${sides[0]}`,
        hint: `${counted}${chart.drawn ? ", drawn from all" : ""}. ${ends}${sides.length > 1 ? " Folded and shifted scales change how wide it is." : ""}`,
        columns: ["from", "to", ...sides],
        rows: Array.from({ length: binsOf(chart) }, (_, index) => [short(edgeOf(chart, index)), short(edgeOf(chart, index + 1)), ...sides.map((side) => chart[side][index].toLocaleString("en"))]),
      };
    },
    ranges: (chart) => {
      const rows = [["seen in the original", chart.seen_low, chart.seen_high], ["the scale's range", chart.low, chart.high]].filter((row) => row[1] !== null && row[2] !== null);
      const steps = chart.scale === null || chart.zero_point === null ? "No scale was chosen for it: it stays a float, or gets one at each run." : `${codesOf(chart).toLocaleString("en")} codes (${chart.type}), ${short(chart.scale)} apart, zero point ${chart.zero_point}; a line of the grid every ${stepOf(chart).toLocaleString("en")}.`;
      return { title: `Range of the ${chart.place}`, hint: steps, columns: ["range", "low", "high"], rows: rows.map((row) => [row[0], short(row[1]), short(row[2])]) };
    },
    singular: (chart) => ({
      title: "Singular values of the original weight",
      hint: `Its factors have room for ${chart.kept} of ${chart.total}. With data, low-rank keeps what matters for the inputs that the layer gets, which need not be the largest.`,
      columns: ["number", "singular value"],
      rows: chart.values.map(([number, value]) => [String(number), short(value)]),
    }),
  };

  const tableOf = (told) => {
    const head = make("tr", {}, ...told.columns.map((name, index) => make("th", { scope: "col", textContent: name, className: index ? "number" : "" })));
    const body = told.rows.map((row) => make("tr", {}, ...row.map((text, index) => (index ? make("td", { className: "number", textContent: text }) : make("th", { scope: "row", textContent: text })))));
    const region = make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    region.setAttribute("role", "region");
    region.setAttribute("aria-label", `Figures: ${told.title}`);
    return make("details", {}, make("summary", { textContent: "Figures" }), region);
  };

  const figureOf = (kind, index) => {
    const told = TOLD[kind](data[kind][index]);
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${told.title}. ${told.hint}`);
    const figure = make("figure", { className: "chart" }, make("figcaption", { textContent: told.title }), make("div", { className: "plot small" }, canvas), make("p", { className: "hint", textContent: told.hint }), tableOf(told));
    Object.assign(figure.dataset, { chart: kind, index: String(index) });
    return figure;
  };

  // The row that holds the panel of a layer; one is open at a time.
  const row = (name, panel, width, close) => {
    Object.assign(data, { histogram: panel.histogram ? [panel.histogram] : [], ranges: panel.ranges || [], singular: panel.singular ? [panel.singular] : [] });
    const figures = ["histogram", "ranges", "singular"].flatMap((kind) => data[kind].map((_, index) => figureOf(kind, index)));
    const button = make("button", { type: "button", textContent: "Close" });
    button.addEventListener("click", close);
    const lines = [panel.cause ? `Cause of the error: ${panel.cause}.` : "", panel.factors ? `Its weight became factors: ${panel.factors}. The row tells of the last; the others have rows of their own.` : ""].filter(Boolean);
    const title = make("p", { className: "title" }, make("strong", {}, ...breakable(name)), button);
    const sheet = make("div", { className: "sheet", id: "panel" }, title, ...lines.map((text) => make("p", { textContent: text })), make("div", { className: "charts" }, ...figures));
    sheet.setAttribute("role", "group");
    sheet.setAttribute("aria-label", `Layer ${name}`);
    return make("tr", { className: "panel" }, make("td", { colSpan: width }, sheet));
  };

  return { row };
})();
