(function () {
  "use strict";
  var numbers = JSON.parse(document.getElementById("numbers").textContent);
  var MATRIX = 40; // classes of a confusion matrix that is shown as a whole
  var CONFUSED = 24; // classes of the figure, if there are more
  var PAIRS = 100; // rows of the table of confused pairs
  var FIRST = 12; // wrong clips that are shown before the button
  var TEXTS = 14; // classes of a figure with a number in each cell
  var state = { model: 0, test: 0, lam: 0, axis: "lam", more: false };
  var turns = {}; // the newest drawing of each figure
  var curveView = null;

  function byId(id) { return document.getElementById(id); }
  function add(parent, tag, text, attributes) {
    var element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    Object.keys(attributes || {}).forEach(function (name) {
      element.setAttribute(name, attributes[name]);
    });
    parent.appendChild(element);
    return element;
  }
  function clear(element) { while (element.firstChild) element.removeChild(element.firstChild); }
  function known(value) { return value !== null && value !== undefined; }
  function percent(value) { return known(value) ? (100 * value).toFixed(1) : "–"; }
  function points(value) {
    if (!known(value)) return "–";
    var text = Math.abs(100 * value).toFixed(1);
    return text === "0.0" ? text : (value > 0 ? "+" : "−") + text;
  }
  function change(value, from) { return known(value) && known(from) ? value - from : null; }
  function count(n, noun) { return n.toLocaleString("en") + " " + noun + (n === 1 ? "" : "s"); }
  function lamText(lam) { return known(lam) ? "λ = " + lam : "its own weights"; }
  function present(id, shown) { byId(id).hidden = !shown; }
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue("--ov-" + name).trim();
  }

  function runOf(model, test) {
    return numbers.runs.find(function (run) { return run.model === model && run.test === test; });
  }
  function run() { return runOf(state.model, state.test); }
  function runsOfTest(test) {
    return numbers.runs.filter(function (run) { return run.test === test; });
  }
  function testsOf(model) {
    return numbers.runs.filter(function (run) { return run.model === model; })
      .map(function (run) { return run.test; });
  }
  function lam() { return run().lams[state.lam]; }
  function at(other, value) { return other.lams.indexOf(value); }

  // A table: heads are [text, kind], rows begin with their head. Cells are text or [text, element].
  function table(id, caption, heads, rows) {
    var element = byId(id);
    clear(element);
    add(element, "caption", caption);
    var row = add(add(element, "thead"), "tr");
    heads.forEach(function (head) {
      add(row, "th", head[0], head[1] ? { scope: "col", "class": head[1] } : { scope: "col" });
    });
    var body = add(element, "tbody");
    rows.forEach(function (cells) {
      var line = add(body, "tr", null, cells.attributes);
      cells.forEach(function (cell, index) {
        var words = Array.isArray(cell) ? cell[0] : cell;
        var kind = heads[index][1];
        var made = index === 0 ? add(line, "th", words, { scope: "row" })
          : add(line, "td", words, kind ? { "class": kind } : {});
        if (Array.isArray(cell)) made.appendChild(cell[1]);
      });
    });
  }

  function options(id, items, value) {
    var element = byId(id);
    clear(element);
    items.forEach(function (item) { add(element, "option", item[1], { value: item[0] }); });
    element.value = String(value);
    present(id + "-choice", items.length > 1);
  }

  // --- the choice of model, test and λ ---------------------------------------------------------

  function nearest(lams, value) {
    var best = 0;
    lams.forEach(function (lam, index) {
      if (Math.abs(lam - value) < Math.abs(lams[best] - value)) best = index;
    });
    return best;
  }
  function choose(model, test, value) {
    if (!runOf(model, test)) test = testsOf(model)[0];
    state.model = model;
    state.test = test;
    state.lam = nearest(run().lams, known(value) ? value : 0.5);
    options("model", numbers.models.map(function (name, index) { return [index, name]; }), model);
    options("test", testsOf(model).map(function (index) {
      return [index, numbers.tests[index]];
    }), test);
    var slider = byId("lam");
    slider.max = run().lams.length - 1;
    slider.value = state.lam;
    present("lam-choice", run().lams.length > 1);
    axes();
    showAll();
  }
  function axes() {
    var items = [["lam", "λ"]];
    testsOf(state.model).forEach(function (test) {
      var other = runOf(state.model, test);
      var shared = run().lams.some(function (value) { return at(other, value) >= 0; });
      if (test !== state.test && shared && run().lams.length > 1) {
        items.push([String(test), "top-1 on " + numbers.tests[test]]);
      }
    });
    var values = items.map(function (item) { return item[0]; });
    if (!state.chosen) state.axis = values[values.length > 1 ? 1 : 0];
    if (values.indexOf(state.axis) < 0) state.axis = "lam";
    options("axis", items, state.axis);
  }

  function showAll() {
    drawCurve();
    showLam();
  }
  function showLam() {
    var slider = byId("lam");
    slider.setAttribute("aria-valuetext", lamText(lam()));
    byId("lam-value").textContent = lamText(lam());
    say();
    showNow();
    showClasses();
    showConfusions();
    showClips();
    document.querySelectorAll("#all tr[data-run]").forEach(function (row) {
      var here = Number(row.dataset.run) === numbers.runs.indexOf(run()) &&
        Number(row.dataset.lam) === state.lam;
      if (here) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    });
    if (curveView) {
      curveView.signal("lamNow", known(lam()) ? lam() : -1).runAsync();
    }
  }
  function say() {
    var one = run(), words = known(lam()) ? "At " + lamText(lam()) : numbers.models[state.model];
    words += ": top-1 " + percent(one.top1[state.lam]) + " %, top-5 " +
      percent(one.top5[state.lam]) + " % on " + numbers.tests[state.test];
    if (one.baseline) {
      var by = change(one.top1[state.lam], one.baseline.top1);
      if (known(by)) {
        words += Math.abs(by) < 5e-4 ? ", the same as " + one.baseline.name
          : ", " + Math.abs(100 * by).toFixed(1) + " points " + (by > 0 ? "above " : "below ") +
            one.baseline.name;
      }
    }
    byId("say").textContent = words + ".";
  }

  // --- accuracies ------------------------------------------------------------------------------

  function showNow() {
    var rows = [], clip = false, std = false;
    testsOf(state.model).forEach(function (test) {
      var one = runOf(state.model, test), i = at(one, lam());
      if (i < 0) return;
      var from = one.baseline ? one.baseline.top1 : null;
      clip = clip || Boolean(one.baseline);
      var row = [numbers.tests[test], spread(one, "top1", i), spread(one, "top5", i),
        percent(from), points(change(one.top1[i], from))];
      std = std || known(one.top1_std[i]);
      row.attributes = test === state.test ? { "aria-current": "true" } : {};
      rows.push(row);
      if (test !== state.test || one.splits.length < 2) return;
      one.splits.forEach(function (split) {
        var part = [split.name, percent(split.top1[i]), percent(split.top5[i]), "", ""];
        part.attributes = { "class": "part" };
        rows.push(part);
      });
    });
    var heads = [["Test"], ["Top-1"], ["Top-5"]];
    if (clip) heads.push(["CLIP"], ["Change"]);
    else rows.forEach(function (row) { row.length = 3; });
    byId("here-title").textContent = known(lam()) ? "At " + lamText(lam()) : "With its own weights";
    table("now", "Accuracy of " + numbers.models[state.model] + " in %" +
      (known(lam()) ? " at " + lamText(lam()) : "") +
      (std ? ", mean ± standard deviation over the splits" : ""), heads, rows);
    present("here", true);
  }
  function spread(one, k, i) {
    var std = one[k + "_std"][i];
    return percent(one[k][i]) + (known(std) ? " ± " + percent(std) : "");
  }

  function showClasses() {
    var details = run().details, rows = [], clip = details && details.clip;
    present("by-class", true);
    present("classes", Boolean(details));
    byId("classes").parentNode.hidden = !details;
    present("order-choice", Boolean(details));
    if (!details) {
      byId("class-note").textContent = missing("the accuracy of each class");
      return;
    }
    byId("class-note").textContent = clip
      ? "CLIP is " + baselineText() + "."
      : run().clip ? "This model is the original CLIP."
        : "To see the change against CLIP, evaluate the original CLIP on the same videos too " +
          "(the same command without --checkpoint), or add 1 to the values of --lam.";
    var accuracy = details.accuracy[state.lam];
    details.classes.forEach(function (name, index) {
      var by = clip ? change(accuracy[index], clip[index]) : null;
      rows.push({ name: name, clips: details.counts ? details.counts[index] : null,
        value: accuracy[index], from: clip ? clip[index] : null, by: by });
    });
    sorted(rows, clip);
    var widest = Math.max.apply(null, rows.map(function (row) { return Math.abs(row.by || 0); }));
    var heads = [["Class"]];
    if (details.counts) heads.push(["Clips"]);
    if (clip) heads.push(["CLIP"]);
    heads.push(["Top-1"]);
    if (clip) heads.push(["Change"]);
    table("classes", "Top-1 accuracy of each class in %" +
      (known(lam()) ? " at " + lamText(lam()) : ""), heads, rows.map(function (row) {
      var cells = [row.name];
      if (details.counts) cells.push(String(row.clips));
      if (clip) cells.push(percent(row.from));
      cells.push(percent(row.value));
      if (clip) cells.push(known(row.by) ? [points(row.by), bar(row.by, widest)] : "–");
      return cells;
    }));
  }
  function baselineText() {
    var model = run().baseline.model;
    return known(model) ? "“" + numbers.models[model] + "” of this page"
      : "the point λ = 1 of the sweep: the original weights, with the temporal attention of the " +
        "model";
  }
  function sorted(rows, clip) {
    var order = byId("order").value;
    Array.from(byId("order").options).forEach(function (option) {
      option.disabled = !clip && (option.value === "worse" || option.value === "better");
    });
    if (!clip && (order === "worse" || order === "better")) order = "low";
    var key = order === "worse" || order === "better" ? "by" : "value";
    var sign = order === "better" || order === "high" ? -1 : 1;
    rows.sort(function (a, b) {
      if (order === "name") return a.name < b.name ? -1 : 1;
      if (!known(a[key]) || !known(b[key])) return known(b[key]) - known(a[key]);
      return sign * (a[key] - b[key]) || (a.name < b.name ? -1 : 1);
    });
  }
  function bar(value, widest) {
    var element = document.createElement("span");
    element.className = value < 0 ? "bar less" : "bar";
    element.setAttribute("aria-hidden", "true");
    element.style.width = (widest ? 100 * Math.abs(value) / widest : 0) + "%";
    element.style.marginLeft = "auto";
    return element;
  }
  function missing(what) {
    return "These results do not hold " + what + ". Run the same 'openvclip evaluate' command " +
      "again with this version of openvclip, and then 'openvclip report'. The features are kept, " +
      "so it takes seconds.";
  }

  // --- confusions ------------------------------------------------------------------------------

  function cellsAt() {
    var flat = run().details.cells[state.lam], cells = [];
    for (var i = 0; i < flat.length; i += 3) {
      cells.push({ t: flat[i], p: flat[i + 1], n: flat[i + 2] });
    }
    return cells;
  }
  function showConfusions() {
    var details = run().details, found = Boolean(details && details.cells);
    present("confused", true);
    byId("matrix-figure").parentNode.parentNode.hidden = !found;
    present("matrix-details", found && details.classes.length <= MATRIX);
    if (!found) {
      byId("confused-note").textContent = missing("which classes are confused");
      return;
    }
    var names = details.classes, cells = cellsAt(), totals = {};
    cells.forEach(function (cell) { totals[cell.t] = (totals[cell.t] || 0) + cell.n; });
    var wrong = cells.filter(function (cell) { return cell.t !== cell.p; });
    var shown = names.map(function (_, index) { return index; });
    if (names.length > MATRIX) {
      var most = new Set();
      wrong.forEach(function (cell) {
        var more = Number(!most.has(cell.t)) + Number(!most.has(cell.p));
        if (most.size + more <= CONFUSED) { most.add(cell.t); most.add(cell.p); }
      });
      shown = shown.filter(function (index) { return most.has(index); });
    }
    byId("confused-note").textContent = names.length > MATRIX
      ? "The figure shows " + shown.length + " of " + names.length +
        " classes: those of the pairs that are confused most. The table lists the pairs, the " +
        "most clips first."
      : "Rows are true classes. A cell is the share of the clips of its row.";
    drawMatrix(names, cells, totals, shown);
    var listed = wrong.slice(0, PAIRS);
    table("pairs", count(wrong.length, "confused pair") +
      (known(lam()) ? " at " + lamText(lam()) : "") +
      (wrong.length > PAIRS ? ", the first " + PAIRS : ""),
      [["True class"], ["Predicted", "text"], ["Clips"], ["Share in %"]],
      listed.map(function (cell) {
        return [names[cell.t], names[cell.p], String(cell.n), percent(cell.n / totals[cell.t])];
      }));
    showMatrix(names, cells);
  }
  function showMatrix(names, cells) {
    if (names.length > MATRIX) { clear(byId("matrix")); return; }
    var rows = names.map(function (name) {
      return [name].concat(names.map(function () { return "0"; }));
    });
    cells.forEach(function (cell) { rows[cell.t][cell.p + 1] = String(cell.n); });
    table("matrix", "Number of clips of each true class (rows) by predicted class (columns)",
      [["True class"]].concat(names.map(function (name) { return [name]; })), rows);
  }

  // --- clips -----------------------------------------------------------------------------------

  function showClips() {
    var details = run().details, found = Boolean(details && details.wrong), list = byId("clips");
    clear(list);
    present("wrong", true);
    present("more", false);
    if (!found) {
      present("show-choice", false);
      byId("wrong-note").textContent = missing("the answer for each clip");
      return;
    }
    var wrong = details.wrong[state.lam], names = details.classes;
    var comparable = Boolean(details.clip && wrong.shown.some(function (clip) {
      return known(clip.clip);
    }));
    present("show-choice", comparable);
    var lost = comparable && byId("show").value === "lost";
    var shown = wrong.shown.filter(function (clip) { return !lost || clip.clip; });
    var total = lost ? wrong.lost : wrong.total;
    byId("wrong-note").textContent = count(total, "clip") + (total === 1 ? " has" : " have") +
      " a wrong answer" + (lost ? " here and a right answer from the original CLIP" : "") +
      (total > shown.length ? "; this page has " + shown.length + " of them" : "") +
      ". The surest wrong answers come first" +
      (comparable && !lost ? ", after the clips that the original CLIP gets right." : ".");
    var hidden = state.more ? 0 : Math.max(0, shown.length - FIRST);
    shown.slice(0, shown.length - hidden).forEach(function (clip) { addClip(list, clip, names); });
    present("more", hidden > 0);
    byId("more").textContent = "Show " + hidden + " more";
  }
  function addClip(list, clip, names) {
    var item = add(list, "li");
    if (known(clip.picture)) {
      add(item, "img", null, { src: numbers.pictures[clip.picture], alt: "" });
    } else if (clip.note) {
      add(item, "span", clip.note, { "class": "none" });
    }
    var terms = add(item, "dl");
    add(terms, "dt", "true");
    add(add(terms, "dd"), "b", names[clip["true"]]);
    add(terms, "dt", "answer");
    if (!clip.labels.length) add(terms, "dd", "none: the video can't be read");
    clip.labels.forEach(function (label, index) {
      if (index) add(terms, "dt", (index + 1) + ".");
      add(terms, "dd", names[label] + " " + (known(clip.scores[index])
        ? clip.scores[index].toFixed(3) : ""));
    });
    if (clip.rank >= 0) {
      add(terms, "dt", "rank");
      add(terms, "dd", "true class in place " + (clip.rank + 1));
    }
    if (known(clip.clip)) {
      add(terms, "dt", "CLIP");
      add(terms, "dd", clip.clip ? "right" : "wrong, too");
    }
    var parts = run().splits.length > 1 ? " (" + clip.split + ")" : "";
    add(item, "p", clip.path + parts, { "class": "path" });
  }

  // --- figures ---------------------------------------------------------------------------------

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
  // Draws a figure unless a newer one was begun.
  function draw(id, spec, then) {
    var turn = turns[id] = (turns[id] || 0) + 1, element = byId(id);
    spec.$schema = "https://vega.github.io/schema/vega-lite/v6.json";
    spec.config = config();
    window.vegaEmbed(element, spec, { actions: false, ast: true, renderer: "svg",
      tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" }
    }).then(function (result) {
      if (turns[id] !== turn) result.finalize();
      else if (then) then(result.view);
    });
  }

  function curvePoints() {
    var across = state.axis === "lam" ? null : Number(state.axis), found = [];
    runsOfTest(state.test).forEach(function (one) {
      one.lams.forEach(function (value, i) {
        var x = value;
        if (across !== null) {
          var other = runOf(one.model, across), j = other ? at(other, value) : -1;
          if (j < 0) return;
          x = known(other.top1[j]) ? 100 * other.top1[j] : null;
        }
        if (!known(one.top1[i]) || (!known(x) && across !== null)) return;
        found.push({ model: numbers.models[one.model], lam: known(value) ? value : -1, x: x,
          y: 100 * one.top1[i], text: known(value) ? String(value) : "",
          flat: across === null && !known(value), own: one.model === state.model });
      });
    });
    return found;
  }
  function drawCurve() {
    var all = curvePoints(), across = state.axis !== "lam";
    var points = all.filter(function (point) { return !point.flat; });
    var flat = all.filter(function (point) { return point.flat; });
    var single = run().lams.length < 2 && points.length < 2;
    present("curve", !single && points.length > 0);
    byId("curve").parentNode.className = single ? "" : "two";
    curveView = null;
    if (single || !points.length) return;
    byId("curve-title").textContent = across ? "Trade-off along λ" : "Accuracy along λ";
    var names = numbers.models.filter(function (name) {
      return all.some(function (point) { return point.model === name; });
    });
    var places = names.map(function (name) { return numbers.models.indexOf(name); });
    function pick(list) { return places.map(function (i) { return list[i % list.length]; }); }
    var scaleColour = { domain: names, range: pick(palette()) };
    var legend = names.length > 1 ? { orient: "bottom", direction: "vertical", title: null,
      symbolOpacity: 1 } : null;
    var yTitle = "top-1 on " + numbers.tests[state.test] + " (%)";
    var x = { field: "x", type: "quantitative", axis: { tickCount: 8, labelOverlap: true }, scale: { zero: false, nice: false, padding: across ? 44 : 16 },
      title: across ? "top-1 on " + numbers.tests[Number(state.axis)] + " (%)"
        : "λ, the weight of the original CLIP" };
    var y = { field: "y", type: "quantitative", title: yTitle, scale: { zero: false, padding: 20 } };
    var byModel = { field: "model", type: "nominal", scale: scaleColour, legend: legend };
    var tips = [{ field: "model", title: "model" }, { field: "text", title: "λ" },
      { field: "y", title: "top-1 here", format: ".1f" }];
    if (across) tips.push({ field: "x", title: "top-1 on the other test", format: ".1f" });
    var now = "datum.own && datum.lam === lamNow";
    var layers = [
      { transform: [{ filter: "datum.lam >= 0" }], mark: { type: "line", strokeWidth: 2 },
        encoding: { x: x, y: y, color: byModel, order: { field: "lam" } } },
      { mark: { type: "point", filled: true, size: 70, opacity: 1 },
        encoding: { x: x, y: y, color: byModel, tooltip: tips,
          shape: { field: "model", type: "nominal", legend: legend,
            scale: { domain: names, range: pick(SHAPES) } } } },
      { transform: [{ filter: now }], mark: { type: "point", size: 420, strokeWidth: 3,
        filled: false, opacity: 1 }, encoding: { x: x, y: y, color: { value: colour("text") } } },
      { transform: [{ filter: now + " && datum.lam >= 0" }], mark: { type: "text",
        align: across ? "right" : "center", dx: across ? -16 : 0, dy: across ? -8 : -20,
        fontWeight: "bold", fontSize: 13 }, encoding: { x: x, y: y,
        text: { field: "label" }, color: { value: colour("text") } } }
    ];
    points.forEach(function (point) { point.label = "λ = " + point.text; });
    if (across) {
      layers.push({ transform: [{ filter: "datum.own && datum.lam >= 0 && datum.lam !== lamNow" }],
        mark: { type: "text", dx: 8, dy: 9, align: "left", fontSize: 11 },
        encoding: { x: x, y: y, text: { field: "text" }, color: { value: colour("soft") } } });
    }
    if (flat.length) {
      layers.push({ data: { values: flat }, mark: { type: "rule", strokeDash: [5, 4], size: 2 },
        encoding: { y: y, color: byModel, tooltip: tips } });
      layers.push({ data: { values: flat }, mark: { type: "text", align: "right", dy: -7, dx: -4,
        fontSize: 12 }, encoding: { y: y, x: { value: "width" }, text: { field: "model" },
        color: byModel } });
    }
    byId("curve-figure").setAttribute("aria-label", (across
      ? "Curve: top-1 on " + numbers.tests[state.test] + " over top-1 on " +
        numbers.tests[Number(state.axis)] : "Curve: top-1 on " + numbers.tests[state.test] +
        " over λ") + ". The table “All accuracies” has the same numbers.");
    byId("curve-note").textContent = (across ? "The numbers beside the points are λ. " : "") +
      "The ring is the chosen λ." + (flat.length ? " A dashed line is a model without λ." : "");
    draw("curve-figure", { width: "container", height: 330, data: { values: points },
      autosize: { type: "fit", contains: "padding" },
      params: [{ name: "lamNow", value: known(lam()) ? lam() : -1 }], layer: layers,
      resolve: { scale: { color: "shared" } }
    }, function (view) {
      curveView = view;
      view.signal("lamNow", known(lam()) ? lam() : -1).runAsync();
    });
  }

  function drawMatrix(names, cells, totals, shown) {
    // Two classes can't have the same name, and short names stay readable.
    var domain = shown.map(function (index) { return names[index]; }), keep = new Set(shown);
    var values = cells.filter(function (cell) { return keep.has(cell.t) && keep.has(cell.p); })
      .map(function (cell) {
        return { t: names[cell.t], p: names[cell.p], n: cell.n, share: cell.n / totals[cell.t] };
      });
    byId("matrix-figure").setAttribute("aria-label", "Confusion matrix of " + shown.length +
      " classes. The table of confused pairs has the same numbers.");
    var most = Math.max.apply(null, [0.01].concat(values.map(function (v) { return v.share; })));
    var size = Math.max(220, Math.min(560, 26 * shown.length + 40));
    var axis = { labelLimit: 110, title: null, ticks: false, domain: false, grid: false };
    var x = { field: "p", type: "nominal", scale: { domain: domain, paddingInner: 0.06 },
      axis: Object.assign({ labelAngle: -50, orient: "bottom" }, axis, { title: "predicted" }) };
    var y = { field: "t", type: "nominal", scale: { domain: domain, paddingInner: 0.06 },
      axis: Object.assign({}, axis, { title: "true" }) };
    var layers = [{ mark: { type: "rect" }, encoding: { x: x, y: y,
      color: { field: "share", type: "quantitative", legend: { title: "share", format: ".0%",
        orient: "top", gradientLength: 140 },
        scale: { domain: [0, most], range: [colour("track"), colour("accent-deep")] } },
      tooltip: [{ field: "t", title: "true" }, { field: "p", title: "predicted" },
        { field: "n", title: "clips" }, { field: "share", title: "share", format: ".1%" }] } }];
    if (shown.length <= TEXTS) {
      layers.push({ mark: { type: "text", fontSize: 11 }, encoding: { x: x, y: y,
        text: { field: "n" }, color: { condition: { test: "datum.share > " + 0.45 * most, value: "#fff" },
          value: colour("text") } } });
    }
    draw("matrix-figure", { width: "container", height: size, data: { values: values },
      autosize: { type: "fit", contains: "padding" }, layer: layers });
  }

  // --- events ----------------------------------------------------------------------------------

  var waiting = false;
  byId("lam").addEventListener("input", function () {
    state.lam = Number(byId("lam").value);
    byId("lam").setAttribute("aria-valuetext", lamText(lam()));
    byId("lam-value").textContent = lamText(lam());
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(function () { waiting = false; showLam(); });
  });
  byId("model").addEventListener("change", function () {
    choose(Number(byId("model").value), state.test, lam());
  });
  byId("test").addEventListener("change", function () {
    choose(state.model, Number(byId("test").value), lam());
  });
  byId("axis").addEventListener("change", function () {
    state.axis = byId("axis").value;
    state.chosen = true;
    drawCurve();
  });
  byId("order").addEventListener("change", showClasses);
  byId("show").addEventListener("change", showClips);
  byId("more").addEventListener("click", function () {
    state.more = true;
    showClips();
    var next = byId("clips").children[FIRST];
    if (next) { next.tabIndex = -1; next.focus(); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);

  present("no-script", false);
  present("controls", numbers.runs.length > 1 || numbers.runs[0].lams.length > 1);
  // The page begins with the model that has the most values of λ.
  var first = numbers.runs.reduce(function (best, one) {
    return one.lams.length > best.lams.length ? one : best;
  });
  choose(first.model, first.test);
})();
