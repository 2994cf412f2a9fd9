// The tables and the list of clips at the chosen λ.

function showNow() {
  var rows = [], clip = false, std = false, other = [];
  testsOf(state.model).forEach(function (test) {
    var one = runOf(state.model, test), i = at(one, lam());
    if (i < 0) return;
    var from = one.baseline ? one.baseline.top1 : null;
    clip = clip || Boolean(one.baseline);
    var differs = (one.baseline && one.baseline.differs) || [];
    if (differs.length) other.push(numbers.tests[test] + " (" + differs.join(", ") + ")");
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
  byId("now-note").textContent = other.length ? "CLIP was evaluated with other settings on " +
    other.join("; ") + ", so the change comes from these settings too." : "";
  present("here", true);
}
function spread(one, k, i) {
  var std = one[k + "_std"][i];
  return percent(one[k][i]) + (known(std) ? " ± " + percent(std) : "");
}

function showClasses() {
  var details = run().details, rows = [], clip = details && details.clip, one = run();
  present("by-class", true);
  present("classes", Boolean(details));
  byId("classes").parentNode.hidden = !details;
  present("order-choice", Boolean(details));
  if (!details) {
    byId("class-note").textContent = missing("the accuracy of each class");
    return;
  }
  byId("class-note").textContent = clip
    ? "The column CLIP is " + baselineText() + "."
    : one.clip ? "This model is the original CLIP."
      : one.baseline ? "The results of the original CLIP do not hold the accuracy of each class. " +
        again(runOf(one.baseline.model, state.test))
        : "To see the change against CLIP, evaluate the original CLIP on the same videos too" +
          (known(lam()) ? " (the same command with --lam 1 --no-expand and another --out), or add " +
            "1 to the values of --lam." : ", and give its results with --original.");
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
  var from = run().baseline;
  if (known(from.model)) {
    return "the model “" + numbers.models[from.model] + "”" + (from.differs.length
      ? ", which was evaluated with other settings (" + from.differs.join(", ") + ")" : "");
  }
  return "the point λ = 1 of the sweep: the original weights, with the temporal attention of the model";
}
function sorted(rows, clip) {
  function byChange(order) { return order === "worse" || order === "better"; }
  var order = !clip && byChange(state.order) ? "low" : state.order;
  Array.from(byId("order").options).forEach(function (option) {
    option.disabled = !clip && byChange(option.value);
  });
  byId("order").value = order;
  var key = byChange(order) ? "by" : "value";
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
  return "These results do not hold " + what + ". " + again(run());
}
function again(one) {
  return one.resumable ? "Run the same 'openvclip evaluate' command again with this version of " +
    "openvclip, and then 'openvclip report'. The features are kept, so it takes seconds."
    : "They were saved by a program of your own, without the option or the answers for it.";
}

function cellsAt() {
  var flat = run().details.cells[state.lam], cells = [];
  for (var i = 0; i < flat.length; i += 3) {
    cells.push({ t: flat[i], p: flat[i + 1], n: flat[i + 2] });
  }
  return cells;
}
function showConfusions() {
  var details = run().details, found = Boolean(details && details.cells);
  var cells = found ? cellsAt() : [];
  var wrong = cells.filter(function (cell) { return cell.t !== cell.p; });
  present("confused", true);
  byId("matrix-figure").parentNode.parentNode.hidden = !wrong.length;
  present("matrix-details", found && (wrong.length > 0 || details.classes.length <= MATRIX));
  if (!found) {
    byId("confused-note").textContent = missing("which classes are confused");
    return;
  }
  var names = details.classes, totals = totalsOf(cells, details.counts);
  var shown = classesOfMatrix(names, wrong), some = shown.length < names.length;
  showMatrix(names, cells, shown);
  if (!wrong.length) {
    byId("confused-note").textContent = "No clip has the answer of another class.";
    return;
  }
  byId("confused-note").textContent = some
    ? "The figure shows " + shown.length + " of " + names.length + " classes: those of the pairs " +
      "that are confused most. The table lists the pairs, the most clips first."
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
}
// The classes that a matrix shows: all, or those of the pairs that are confused most.
function classesOfMatrix(names, wrong) {
  var all = names.map(function (_, index) { return index; }), most = new Set();
  if (names.length <= MATRIX) return all;
  wrong.forEach(function (cell) {
    var more = Number(!most.has(cell.t)) + Number(!most.has(cell.p));
    if (most.size + more <= CONFUSED) { most.add(cell.t); most.add(cell.p); }
  });
  return all.filter(function (index) { return most.has(index); });
}
// The clips of each class. Cells do not count the clips without an answer, which older results hide.
function totalsOf(cells, counts) {
  if (counts) return counts;
  var totals = {};
  cells.forEach(function (cell) { totals[cell.t] = (totals[cell.t] || 0) + cell.n; });
  return totals;
}
function showMatrix(names, cells, shown) {
  var place = new Map(shown.map(function (index, i) { return [index, i]; }));
  var rows = shown.map(function (index) {
    return [names[index]].concat(shown.map(function () { return "0"; }));
  });
  cells.forEach(function (cell) {
    if (place.has(cell.t) && place.has(cell.p)) {
      rows[place.get(cell.t)][place.get(cell.p) + 1] = String(cell.n);
    }
  });
  table("matrix", "Number of clips of each true class (rows) by predicted class (columns)" +
    (shown.length < names.length ? ", of the classes of the figure" : ""),
    [["True class"]].concat(shown.map(function (index) { return [names[index]]; })), rows);
}

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
  byId("wrong-note").textContent = (total ? count(total, "clip") : "No clip") +
    (total > 1 ? " have" : " has") + " a wrong answer" +
    (lost ? " here and a right answer from the original CLIP" : "") +
    (total > shown.length ? "; this page has " + shown.length + " of them" : "") + "." +
    (shown.length > 1 ? " The surest wrong answers come first" +
      (comparable && !lost ? ", after the clips that the original CLIP gets right." : ".") : "");
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
  add(add(add(terms, "dd"), "b"), "bdi", names[clip["true"]]);
  add(terms, "dt", "answer");
  if (!clip.labels.length) add(terms, "dd", "none: the video can't be read");
  clip.labels.forEach(function (label, index) {
    if (index) add(terms, "dt", (index + 1) + ".");
    var score = clip.scores[index], answer = add(terms, "dd");
    add(answer, "bdi", names[label]); // keeps the direction of the name away from the score
    answer.append(known(score) ? " " + score.toFixed(3).replace("-", "−") : "");
  });
  if (clip.rank >= 0) {
    add(terms, "dt", "rank");
    add(terms, "dd", "true class in place " + (clip.rank + 1) +
      (clip.labels[0] === clip["true"] ? ": another class has the same score" : ""));
  }
  if (known(clip.clip)) {
    add(terms, "dt", "CLIP");
    add(terms, "dd", clip.clip ? "right" : "wrong, too");
  }
  var parts = run().splits.length > 1 ? " (" + clip.split + ")" : "";
  var path = add(item, "p", null, { "class": "path" });
  add(path, "bdi", clip.path);
  path.append(parts);
}
