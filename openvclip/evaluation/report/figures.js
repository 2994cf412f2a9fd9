// The figures: the curve along λ, and the confusion matrix.

var turns = {}; // number of the newest drawing of each figure
var drawings = {}; // what vegaEmbed returned for each figure

var SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"];
function palette() {
  return matchMedia("(prefers-color-scheme: dark)").matches
    ? ["#8fb4ef", "#f0a94a", "#7fd1a6", "#ff8a80", "#d3a6f2", "#c9c48a"]
    : ["#2456a6", "#b25e00", "#1b7f4d", "#c4302b", "#7a3fa8", "#6d6614"];
}
function config() {
  var text = colour("text"), soft = colour("soft"), line = colour("line");
  return {
    background: null, aria: false, font: "system-ui, sans-serif",
    view: { stroke: line },
    axis: { labelColor: soft, titleColor: text, gridColor: line, domainColor: line,
      tickColor: line, titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 13 },
    legend: { labelColor: text, titleColor: soft, labelFontSize: 12, labelLimit: 400 }
  };
}
// Draws a figure unless a newer one was begun. Vega gives the element that it draws into a role and a
// name of its own, so this is an element inside of the figure.
function draw(id, spec, then) {
  if (!window.vegaEmbed) { // an old browser, which can't run the library
    byId(id).textContent = "This browser can't draw the figure.";
    return;
  }
  var turn = turns[id] = (turns[id] || 0) + 1, element = byId(id).firstElementChild;
  spec.$schema = "https://vega.github.io/schema/vega-lite/v6.json";
  spec.config = config();
  window.vegaEmbed(element, spec, { actions: false, ast: true, renderer: "svg",
    tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" }
  }).then(function (result) {
    if (turns[id] !== turn) { result.finalize(); return; }
    // Without this, each drawing of the past would still be drawn anew when the window is resized.
    if (drawings[id]) drawings[id].finalize();
    drawings[id] = result;
    if (then) then();
  });
}

function curvePoints() {
  var across = state.axis === "lam" ? null : Number(state.axis), found = [];
  runsOfTest(state.test).forEach(function (one) {
    var other = across === null ? null : runOf(one.model, across);
    one.lams.forEach(function (value, i) {
      var there = other ? other.top1[at(other, value)] : null;
      if (!known(one.top1[i]) || (across !== null && !known(there))) return;
      found.push({ model: numbers.models[one.model], lam: value, y: 100 * one.top1[i],
        x: across === null ? value : 100 * there, here: percent(one.top1[i]),
        there: percent(there), text: known(value) ? String(value) : "", label: lamText(value),
        flat: across === null && !known(value), own: one.model === state.model });
    });
  });
  return found;
}
function drawCurve() {
  var all = curvePoints(), across = state.axis !== "lam";
  var points = all.filter(function (point) { return !point.flat; });
  var flat = all.filter(function (point) { return point.flat; });
  var shown = points.length > 0 && (run().lams.length > 1 || points.length > 1);
  present("curve", shown);
  byId("curve").parentNode.className = shown ? "two" : "";
  if (!shown) return;
  byId("curve-title").textContent = across ? "Trade-off along λ" : "Accuracy along λ";
  byId("curve-note").textContent = (across ? "The numbers beside the points are λ. " : "") +
    (known(lam()) ? "The ring is the chosen λ. " : "") +
    (flat.length ? "A dashed line is a model without λ." : "");
  byId("curve-figure").setAttribute("aria-label", "Curve: top-1 on " + numbers.tests[state.test] +
    " over " + (across ? "top-1 on " + numbers.tests[Number(state.axis)] : "λ") +
    ". The table “All accuracies” has the same numbers.");
  draw("curve-figure", { width: "container", height: 330, data: { values: points },
    autosize: { type: "fit", contains: "padding" },
    params: [{ name: "lamNow", value: lam() }],
    layer: curveLayers(across, byModel(all)).concat(flat.length ? flatLayers(flat, byModel(all)) : []),
    resolve: { scale: { color: "shared" } }
  }, moveRing);
}
// The colour and the shape of each model that has points. They stay when another model is chosen.
function byModel(points) {
  var colours = palette();
  var names = numbers.models.filter(function (name) {
    return points.some(function (point) { return point.model === name; });
  });
  function encoding(valueOf) {
    return { field: "model", type: "nominal", legend: names.length > 1
      ? { orient: "bottom", direction: "vertical", title: null, symbolOpacity: 1 } : null,
      scale: { domain: names, range: names.map(function (name) {
        return valueOf(numbers.models.indexOf(name));
      }) } };
  }
  return {
    color: encoding(function (i) { return colours[i % colours.length]; }),
    // From the seventh model on, a colour comes again with another shape.
    shape: encoding(function (i) {
      return SHAPES[(i + Math.floor(i / colours.length)) % SHAPES.length];
    })
  };
}
function accuracyAxis() {
  return { field: "y", type: "quantitative", title: "top-1 on " + numbers.tests[state.test] + " (%)",
    scale: { zero: false, padding: 20 } };
}
function tips(across) {
  return [{ field: "model", title: "model" }, { field: "text", title: "λ" },
    { field: "here", title: "top-1 here" }]
    .concat(across ? [{ field: "there", title: "top-1 on the other test" }] : []);
}
function curveLayers(across, model) {
  var x = { field: "x", type: "quantitative", axis: { tickCount: 8, labelOverlap: true },
    scale: { zero: false, nice: false, padding: across ? 44 : 16 },
    title: across ? "top-1 on " + numbers.tests[Number(state.axis)] + " (%)"
      : "λ, the weight of the original CLIP" };
  var y = accuracyAxis(), text = { value: colour("text") };
  var now = "datum.own && datum.lam === lamNow", onCurve = "datum.lam !== null";
  var layers = [
    { transform: [{ filter: onCurve }], mark: { type: "line", strokeWidth: 2 },
      encoding: { x: x, y: y, color: model.color, order: { field: "lam" } } },
    { mark: { type: "point", filled: true, size: 70, opacity: 1 },
      encoding: { x: x, y: y, color: model.color, shape: model.shape, tooltip: tips(across) } },
    { transform: [{ filter: now }], mark: { type: "point", size: 420, strokeWidth: 3,
      filled: false, opacity: 1 }, encoding: { x: x, y: y, color: text } },
    { transform: [{ filter: now + " && " + onCurve }], mark: { type: "text",
      align: across ? "right" : "center", dx: across ? -16 : 0, dy: across ? -8 : -20,
      fontWeight: "bold", fontSize: 13 },
      encoding: { x: x, y: y, text: { field: "label" }, color: text } }
  ];
  if (across) {
    layers.push({ transform: [{ filter: "datum.own && datum.lam !== lamNow && " + onCurve }],
      mark: { type: "text", dx: 8, dy: 9, align: "left", fontSize: 11 },
      encoding: { x: x, y: y, text: { field: "text" }, color: { value: colour("soft") } } });
  }
  return layers;
}
// Models without λ, as dashed lines over λ.
function flatLayers(flat, model) {
  var y = accuracyAxis();
  return [
    { data: { values: flat }, mark: { type: "rule", strokeDash: [5, 4], size: 2 },
      encoding: { y: y, color: model.color, tooltip: tips(false) } },
    { data: { values: flat }, mark: { type: "text", align: "right", dy: -7, dx: -4, fontSize: 12 },
      encoding: { y: y, x: { value: "width" }, text: { field: "model" }, color: model.color } }
  ];
}
function moveRing() {
  var drawing = drawings["curve-figure"];
  if (drawing) drawing.view.signal("lamNow", lam()).runAsync();
}

function drawMatrix(names, cells, totals, shown) {
  // Two classes can't have the same name, and short names stay readable.
  var domain = shown.map(function (index) { return names[index]; }), keep = new Set(shown);
  var values = cells.filter(function (cell) { return keep.has(cell.t) && keep.has(cell.p); })
    .map(function (cell) {
      var share = cell.n / totals[cell.t];
      return { t: names[cell.t], p: names[cell.p], n: cell.n, share: share,
        text: percent(share) + " %" };
    });
  byId("matrix-figure").setAttribute("aria-label", "Confusion matrix of " + shown.length +
    " classes. The table “The confusion matrix as a table” has the same numbers.");
  var most = Math.max.apply(null, [0.01].concat(values.map(function (v) { return v.share; })));
  var step = Math.max(14, Math.min(40, Math.round(480 / shown.length))); // the height of a row
  var width = byId("matrix-figure").clientWidth, limit = width > 480 ? 150 : 100;
  var narrow = (width - limit) / shown.length < 14; // columns without room for a name each
  var axis = { labelLimit: limit, ticks: false, domain: false, grid: false };
  var x = { field: "p", type: "nominal", scale: { domain: domain, paddingInner: 0.06 },
    axis: Object.assign({ labelAngle: -50, labelOverlap: narrow ? "greedy" : false, title: "predicted" }, axis) };
  var y = { field: "t", type: "nominal", scale: { domain: domain, paddingInner: 0.06 },
    axis: Object.assign({ title: "true" }, axis) };
  var layers = [{ mark: { type: "rect" }, encoding: { x: x, y: y,
    color: { field: "share", type: "quantitative", legend: { title: "share", format: ".0%",
      orient: "top", gradientLength: 140 },
      scale: { domain: [0, most], range: [colour("track"), colour("accent-deep")] } },
    tooltip: [{ field: "t", title: "true" }, { field: "p", title: "predicted" },
      { field: "n", title: "clips" }, { field: "text", title: "share" }] } }];
  if (shown.length <= TEXTS) {
    layers.push({ mark: { type: "text", fontSize: 11 }, encoding: { x: x, y: y,
      text: { field: "n" }, color: { value: colour("text"),
        condition: { test: "datum.share > " + 0.45 * most, value: "#fff" } } } });
  }
  draw("matrix-figure", { width: "container", height: step * shown.length, data: { values: values },
    autosize: { type: "fit-x", contains: "padding" }, layer: layers });
}
