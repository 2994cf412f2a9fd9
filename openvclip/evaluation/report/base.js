// What the other scripts of the page share: the numbers, the choice, elements and texts.

var numbers = JSON.parse(document.getElementById("numbers").textContent);
var MATRIX = 40; // classes of a confusion matrix that is shown as a whole
var CONFUSED = 24; // classes of the figure, if there are more
var PAIRS = 100; // rows of the table of confused pairs
var FIRST = 12; // wrong clips that are shown before the button
var TEXTS = 14; // classes of a figure with a number in each cell
// What the reader chose. Before a choice, the axis is the other test, and the order is by the change.
var state = { model: 0, test: 0, lam: 0, axis: "lam", chosen: false, order: "worse", more: false };

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
// Returns a number with one digit as Python rounds it: a tie goes to the even digit. toFixed rounds a
// tie up, which differs for k.25 alone. All numbers of an evaluation have the same rounding then.
function oneDigit(value) { return (value * 4 % 4 === 1 ? value - 0.05 : value).toFixed(1); }
function percent(value) { return known(value) ? oneDigit(100 * value) : "–"; }
function points(value) {
  if (!known(value)) return "–";
  var text = oneDigit(Math.abs(100 * value));
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
