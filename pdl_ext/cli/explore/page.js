// The settings of the form, and everything that follows from them.

const page = JSON.parse(document.getElementById("data").textContent);
const corpus = readCorpus(page);
const places = placesOfRanks(corpus, page.tokens.map(([rank]) => rank));
// By rank, ascending: those that are drawn, of which some are listed as well.
const tokens = page.tokens.map(([rank, id, text], index) => ({rank, id, text, place: places[index]}));
const find = id => document.getElementById(id);

const decades = (first, last) =>
  Array.from({length: last - first}, (_, power) => [1, 2, 5].map(digit => Number(`${digit}e${first + power}`)))
    .flat()
    .concat(Number(`1e${last}`));
const fractions = (first, last, parts) =>
  Array.from({length: (last - first) * parts + 1}, (_, step) => first + step / parts);

// n: how often a type occurs, N: all types together, V: how many types there are.
const FORMULA = {
  PowerLaw: "w = (f + epsilon) ** -alpha\nf = (n + smoothing) / (N + smoothing V)",
  ClassBalanced: "w = (1 - beta) / (1 - beta ** n)",
  Adaptive: "w = (g / max g) (e - 1) + 1\nx = n / median n\ng = exp(-T x), for chi2 x ** 2 exp(-T x)",
  Face: "w = 1 - n / max n",
  Uniform: "w = 1: plain cross-entropy",
};

// values: what a slider has, where null is no limit. check: whether a number that is typed is one for the option.
const NUMBERS = {
  alpha: {
    values: fractions(0, 2, 100),
    check: value => value >= 0 && value <= 1e4,
    expected: "a number from 0 to 10000",
    hint: "0 is cross-entropy",
  },
  epsilon: {values: [0, ...decades(-12, 0)], check: isZeroOrAllowed, expected: "0 or a number from 1e-100 to 1e+18"},
  smoothing: {
    values: [0, ...decades(-3, 3)],
    check: isZeroOrAllowed,
    expected: "0 or a number from 1e-100 to 1e+18",
    hint: "added to every count",
  },
  beta: {
    values: [0, 0.5, ...[1, 2, 3, 4, 5, 6].flatMap(nines => [0.9, 0.95].map(first => nine(first, nines)))],
    check: value => value >= 0 && value < 1,
    expected: "a number from 0 to below 1",
    hint: "0 weighs all alike; towards 1 the weight becomes 1 / n",
  },
  T: {
    values: fractions(0, 5, 20).slice(1),
    check: value => value > 0 && value < Infinity,
    expected: "a finite number > 0",
  },
  max_weight: {
    values: [...decades(-1, 7), null],
    check: value => value > 0 && value < Infinity,
    expected: "a number > 0",
  },
};
const CHOICES = {
  form: {values: ["exp", "chi2"]},
  relative: {values: [true, false], hint: "False: f = n + smoothing"},
  normalize: {values: ["corpus", "types", "none"], hint: "the mean over corpus or types is 1"},
};
// Where the page begins, if that is not Python's default: docs/alpha.md advises to begin so.
const START = {alpha: 0.25};

const FIGURES = {
  effective_fraction: {label: "effective sample", format: percent},
  mass_of_most_frequent: {label: `mass of the ${page.mostFrequent} most frequent types`, format: percent},
  weight_of_most_frequent: {label: "weight of the most frequent", format: digits},
  weight_of_rarest_seen: {label: "weight of the rarest seen", format: digits},
  weight_of_never_seen: {label: "weight of what was never seen", format: digits},
  largest: {label: "largest weight", format: digits},
};

function isZeroOrAllowed(value) {
  return value === 0 || (value >= 1e-100 && value <= 1e18);
}

function nine(first, nines) {
  // In decimal, where 1 - 0.1 ** nines would have a rounding.
  return Number(`0.${"9".repeat(nines - 1)}${String(first).slice(2)}`);
}

function digits(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : "∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  return value.toLocaleString("en", {maximumSignificantDigits: 3});
}

function percent(value) {
  const decimals = {minimumFractionDigits: 1, maximumFractionDigits: 1};
  return Number.isNaN(value) ? "–" : `${(100 * value).toLocaleString("en", decimals)} %`;
}

function whole(value) {
  return value.toLocaleString("en");
}

function pythonLiteral(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

// What the form says: the name of the weighting, its options, and what is wrong with them, one line each.
function readSettings() {
  const name = find("weighting").value;
  const options = {};
  const wrong = [];
  for (const option of Object.keys(page.family[name])) {
    const field = find(option);
    if (option in CHOICES) {
      options[option] = CHOICES[option].values[field.selectedIndex];
      continue;
    }
    const {values, check, expected} = NUMBERS[option];
    const text = field.value.trim();
    const isNone = text === "" && values.includes(null);
    options[option] = isNone ? null : Number(text);
    const isWrong = !isNone && (text === "" || !check(options[option]));
    field.setAttribute("aria-invalid", isWrong);
    if (isWrong) wrong.push(`${option}: got ${text || "nothing"}, expected ${expected}`);
  }
  if (options.alpha > 0 && options.epsilon === 0 && options.smoothing === 0) {
    wrong.push("epsilon: got 0 with smoothing 0, expected one of them > 0: a token never counted would weigh infinity");
  }
  return {name, options, wrong};
}

function pythonLines({name, options}) {
  const given = Object.entries(options)
    .filter(([option, value]) => value !== page.family[name][option])
    .map(([option, value]) => `${option}=${pythonLiteral(value)}`);
  return [
    "from pdl_ext import PDLLoss",
    `from pdl_ext.weighting import ${name}`,
    "",
    `weighting = ${pythonCall(name, given)}`,
    `loss_fn = ${pythonCall("PDLLoss", [page.literal, "weighting=weighting"])}`,
  ].join("\n");
}

// On one line where that is short.
function pythonCall(name, given) {
  const line = `${name}(${given.join(", ")})`;
  return line.length < 30 ? line : `${name}(\n${given.map(each => `    ${each},\n`).join("")})`;
}

function createElement(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A number for eyes, with all of its digits for programs and in a tooltip.
function dataElement(value, format) {
  return createElement("data", {value: String(value), title: String(value)}, format(value));
}

function makeForm() {
  find("weighting").append(...Object.keys(page.family).map(name => new Option(name)));
  for (const option of [...Object.keys(NUMBERS), ...Object.keys(CHOICES)]) {
    const defaults = Object.values(page.family).find(family => option in family);
    const start = START[option] ?? defaults[option];
    find("options").append(option in CHOICES ? choiceOption(option, start) : numberOption(option, start));
  }
}

function choiceOption(option, start) {
  const {values, hint = ""} = CHOICES[option];
  const row = find("choice-option").content.cloneNode(true).firstElementChild;
  const [label, select, explanation] = row.children;
  Object.assign(label, {textContent: option, htmlFor: option});
  select.id = option;
  select.append(...values.map(value => new Option(typeof value === "string" ? value : pythonLiteral(value))));
  select.selectedIndex = values.indexOf(start);
  explain(option, explanation, hint, select);
  return row;
}

function numberOption(option, start) {
  const {values, hint = ""} = NUMBERS[option];
  const row = find("number-option").content.cloneNode(true).firstElementChild;
  const [label, field, slider, explanation] = row.children;
  Object.assign(label, {textContent: option, htmlFor: option});
  Object.assign(field, {id: option, value: start ?? "", placeholder: values.includes(null) ? "none" : ""});
  Object.assign(slider, {id: `${option}-slider`, max: values.length - 1});
  slider.setAttribute("aria-label", option);
  explain(option, explanation, hint, field, slider);
  slider.addEventListener("input", () => {
    field.value = values[slider.value] ?? "";
    nameSlider(slider, field.value);
  });
  field.addEventListener("input", () => placeSlider(slider, values, field.value));
  placeSlider(slider, values, field.value);
  return row;
}

function explain(option, explanation, hint, ...controls) {
  explanation.id = `${option}-hint`;
  explanation.textContent = hint;
  for (const control of controls) control.setAttribute("aria-describedby", explanation.id);
}

function placeSlider(slider, values, text) {
  const value = text.trim() === "" ? Infinity : Number(text);
  if (Number.isNaN(value)) return;
  const above = values.findIndex(each => each === null || each >= value);
  slider.value = above === -1 ? values.length - 1 : above;
  nameSlider(slider, text);
}

function nameSlider(slider, text) {
  slider.setAttribute("aria-valuetext", text || "none");
}

function makeHeader() {
  const {counts, types} = corpus;
  const typesOf = count => whole(types[counts.indexOf(count)] ?? 0);
  find("file").textContent = page.file;
  document.title = `Token weights of ${page.file}`;
  find("totals").textContent =
    `${whole(page.total)} tokens counted; a vocabulary of ${whole(page.vocabulary)}, of which ${typesOf(0)} were never ` +
    `seen and ${typesOf(1)} once; Zipf slope ${page.slope === null ? "none" : page.slope.toFixed(2)}`;
}

function showFigures(statistics) {
  const told = Object.entries(FIGURES).map(([name, {label, format}]) =>
    createElement(
      "div",
      {id: name},
      createElement("dt", {}, label),
      createElement("dd", {}, dataElement(statistics[name], format)),
    ),
  );
  find("figures").replaceChildren(...told);
}

function fillTable(table, ranks, weights) {
  const hasTexts = tokens.some(({text}) => text !== "");
  const headings = ["id", ...(hasTexts ? ["text"] : []), "count", "weight"];
  const listed = tokens.filter(({rank}) => ranks.includes(rank));
  const rows = listed.map(({id, text, place}) =>
    createElement(
      "tr",
      {},
      createElement("th", {scope: "row"}, String(id)),
      ...(hasTexts ? [createElement("td", {className: "text"}, tokenText(text))] : []),
      createElement("td", {}, whole(corpus.counts[place])),
      createElement("td", {}, dataElement(weights[place], digits)),
    ),
  );
  const heading = createElement("tr", {}, ...headings.map(text => createElement("th", {scope: "col"}, text)));
  table.tHead?.remove();
  table.tBodies[0]?.remove();
  table.append(createElement("thead", {}, heading), createElement("tbody", {}, ...rows));
}

// Apart from what surrounds it, in whichever direction it is written.
function tokenText(text) {
  return createElement("bdi", {}, createElement("code", {}, text));
}

const drawnRanks = tokens.map(({rank}) => rank + 1);
const ends = values => `${digits(values[0])} at rank 1, ${digits(values.at(-1))} at rank ${whole(drawnRanks.at(-1))}`;
const countsChart = new Chart(find("counts-chart"), drawnRanks, {
  nameOf: values => `Counts over ranks: ${ends(values)}`,
});
const weightsChart = new Chart(find("weights-chart"), drawnRanks, {
  nameOf: values => `Weights over ranks: ${ends(values)}`,
  reference: 1,
});
let shownWeights;

function showType() {
  const drawn = Number(find("rank").value);
  const {rank, id, text, place} = tokens[drawn];
  const count = corpus.counts[place];
  const before = `rank ${whole(rank + 1)}, id ${id}`;
  const share = `${digits((100 * count) / page.total)} %`;
  const after = `${whole(count)} times (${share}), weight ${digits(shownWeights[place])}`;
  find("type").replaceChildren(before, ", ", ...(text ? [tokenText(text), ", "] : []), after);
  find("rank").setAttribute("aria-valuetext", find("type").textContent);
  countsChart.mark(drawn);
  weightsChart.mark(drawn);
}

let speaking;
// Once the settings rest, or every step of a slider would be read out.
function speak(statistics) {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const told = Object.entries(FIGURES).map(([name, {label, format}]) => `${label} ${format(statistics[name])}`);
    find("spoken").textContent = told.join(", ");
  }, 700);
}

function update() {
  const settings = readSettings();
  for (const row of find("options").children) {
    row.hidden = !(row.firstElementChild.htmlFor in page.family[settings.name]);
  }
  find("formula").textContent = FORMULA[settings.name];
  find("advice").hidden = settings.name !== "PowerLaw";
  find("error").textContent = settings.wrong.join("\n");
  const isWrong = settings.wrong.length > 0;
  find("results").inert = isWrong;
  find("python").inert = isWrong;
  if (isWrong) return;
  const max_weight = settings.options.max_weight ?? Infinity;
  const {weights, lowest, highest, limited} = weigh(corpus, settings.name, {...settings.options, max_weight});
  find("max_weight-hint").textContent =
    `weights before they are normalised: ${digits(lowest)} to ${digits(highest)}` +
    (limited > 0 ? `, ${whole(limited)} types limited` : "");
  shownWeights = weights;
  const statistics = statisticsOf(corpus, weights, page.mostFrequent);
  showFigures(statistics);
  speak(statistics);
  weightsChart.show(places.map(place => weights[place]));
  showType();
  fillTable(find("most"), page.most, weights);
  fillTable(find("rare"), page.rare, weights);
  find("lines").textContent = pythonLines(settings);
}

let isDue = false;
function updateSoon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    update();
  });
}

async function copyLines() {
  const lines = find("lines");
  try {
    await navigator.clipboard.writeText(lines.textContent);
    find("copied").textContent = "copied";
  } catch {
    getSelection().selectAllChildren(lines);
    find("copied").textContent = "selected: copy it by the keyboard";
  }
}

makeHeader();
makeForm();
find("rank").max = tokens.length - 1;
find("rank").value = 0;
find("rare").hidden = page.rare.length === 0;
countsChart.show(places.map(place => corpus.counts[place]));
update();
find("settings").addEventListener("input", updateSoon);
find("settings").addEventListener("submit", event => event.preventDefault());
find("rank").addEventListener("input", showType);
find("copy").addEventListener("click", copyLines);
for (const chart of [countsChart, weightsChart]) {
  chart.svg.addEventListener("pointermove", event => {
    find("rank").value = chart.placeAt(event.clientX);
    showType();
  });
}
