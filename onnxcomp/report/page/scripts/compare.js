// --- models that were compared ---------------------------------------------------------------------------------------

const SHAPES = ["circle", "rect"]; // a triangle is a loss beyond the edge, a diamond the original

// A colour and a shape for each model while they can be told apart, filled where it is inside the budget.
CHARTS.compared = (chart, hint) => {
  const config = CHARTS.candidates(chart, hint);
  const [kept, others, ...rest] = config.data.datasets;
  const points = [...kept.data, ...others.data];
  if (points.length > LINES.length) {
    Object.assign(kept, { label: "inside the budget" });
    Object.assign(others, { label: "over the budget" });
    return config;
  }
  const own = points.map((point, index) => ({
    ...kept,
    label: point.label,
    data: [point],
    backgroundColor: point.kept ? LINES[index] : "transparent",
    borderColor: LINES[index],
    borderWidth: 2,
    pointStyle: point.cut ? "triangle" : SHAPES[index % SHAPES.length],
    order: 2,
  }));
  config.data.datasets = [...own, ...rest];
  return config;
};
