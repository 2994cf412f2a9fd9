// The choice of model, test and λ. This script is the last: it begins with a first choice.

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
  moveRing();
}
function say() {
  var one = run(), words = known(lam()) ? "At " + lamText(lam()) : numbers.models[state.model];
  words += known(one.top1[state.lam])
    ? ": top-1 " + percent(one.top1[state.lam]) + " %, top-5 " + percent(one.top5[state.lam]) +
      " % on " + numbers.tests[state.test]
    : ": no video of " + numbers.tests[state.test] + " was counted";
  if (one.baseline) {
    var by = change(one.top1[state.lam], one.baseline.top1);
    if (known(by)) {
      var text = oneDigit(Math.abs(100 * by));
      words += text === "0.0" ? ", the same as " + one.baseline.name
        : ", " + text + " points " + (by > 0 ? "above " : "below ") + one.baseline.name;
    }
  }
  byId("say").textContent = words + ".";
}

// Events.

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
byId("order").addEventListener("change", function () {
  state.order = byId("order").value;
  showClasses();
});
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
