// A line over ranks with both axes logarithmic, as an SVG that is drawn anew where it is resized.

const MARGIN = {top: 8, right: 16, bottom: 34, left: 52};
const HEIGHT = 220;
// Pixels from one label of an axis to the next, at least.
const APART = {x: 56, y: 30};

class Chart {
  // ranks: from 1 on, ascending; nameOf: the accessible name for values.
  constructor(svg, ranks, {nameOf, reference}) {
    this.svg = svg;
    this.ranks = ranks;
    this.nameOf = nameOf;
    this.reference = reference;
    this.grid = add(svg, "g", {class: "grid"});
    this.line = add(svg, "path", {class: "line"});
    this.cursor = add(svg, "line", {class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom});
    this.dot = add(svg, "circle", {class: "dot", r: 4});
    this.values = [];
    this.marked = 0;
    new ResizeObserver(() => this.#draw()).observe(svg);
  }

  show(values) {
    this.values = values;
    this.svg.setAttribute("aria-label", this.nameOf(values));
    this.#draw();
  }

  mark(place) {
    this.marked = place;
    this.#drawMark();
  }

  // The place among the ranks that is next to a point of the window.
  placeAt(clientX) {
    const log = this.x.low + (clientX - this.svg.getBoundingClientRect().left - MARGIN.left) / this.x.scale;
    const distances = this.ranks.map(rank => Math.abs(Math.log10(rank) - log));
    return distances.indexOf(Math.min(...distances));
  }

  #draw() {
    const width = this.svg.clientWidth;
    if (width === 0 || this.values.length === 0) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const shown = this.values.filter(value => value > 0);
    const reference = this.reference ?? shown[0] ?? 1;
    this.x = axis(0, Math.log10(this.ranks.at(-1)), width - MARGIN.left - MARGIN.right);
    this.y = axis(
      Math.floor(Math.log10(Math.min(reference, ...shown))),
      Math.ceil(Math.log10(Math.max(reference, ...shown))),
      HEIGHT - MARGIN.top - MARGIN.bottom,
    );
    this.#drawGrid(width);
    let path = "";
    let gap = true;
    this.ranks.forEach((rank, place) => {
      const value = this.values[place];
      // A weight of 0 has no logarithm.
      if (value > 0) path += `${gap ? "M" : "L"}${this.#left(rank).toFixed(1)} ${this.#top(value).toFixed(1)}`;
      gap = !(value > 0);
    });
    this.line.setAttribute("d", path);
    this.#drawMark();
  }

  #drawGrid(width) {
    this.grid.replaceChildren();
    const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
    for (const power of powers(this.x, APART.x)) {
      const x = this.#left(10 ** power);
      add(this.grid, "line", {x1: x, x2: x, y1: MARGIN.top, y2: bottom});
      add(this.grid, "text", {x, y: bottom + 16, "text-anchor": "middle"}, powerOfTen(power));
    }
    for (const power of powers(this.y, APART.y)) {
      const y = this.#top(10 ** power);
      add(this.grid, "line", {x1: MARGIN.left, x2: right, y1: y, y2: y});
      add(this.grid, "text", {x: MARGIN.left - 8, y: y + 4, "text-anchor": "end"}, powerOfTen(power));
    }
    add(this.grid, "text", {x: right, y: HEIGHT - 3, "text-anchor": "end"}, "rank");
    if (this.reference !== undefined) {
      const y = this.#top(this.reference);
      add(this.grid, "line", {class: "reference", x1: MARGIN.left, x2: right, y1: y, y2: y});
    }
  }

  #drawMark() {
    if (this.y === undefined) return;
    const value = this.values[this.marked];
    const x = this.#left(this.ranks[this.marked]);
    set(this.cursor, {x1: x, x2: x});
    set(this.dot, {cx: x, cy: value > 0 ? this.#top(value) : HEIGHT - MARGIN.bottom});
  }

  #left(rank) {
    return MARGIN.left + (Math.log10(rank) - this.x.low) * this.x.scale;
  }

  #top(value) {
    return HEIGHT - MARGIN.bottom - (Math.log10(value) - this.y.low) * this.y.scale;
  }
}

function axis(low, high, pixels) {
  // At least a decade.
  const end = Math.max(high, low + 1);
  return {low, high: end, scale: pixels / (end - low)};
}

// The powers of ten of an axis that are labelled.
function powers({low, high, scale}, apart) {
  const step = Math.max(1, Math.ceil(apart / scale));
  const found = [];
  for (let power = Math.ceil(low / step) * step; power <= high; power += step) found.push(power);
  return found;
}

function powerOfTen(power) {
  if (power < -3 || power > 14) return `1e${power}`;
  const [unit, kept] = [["", "k", "M", "B", "T"][Math.max(0, Math.floor(power / 3))], power > 0 ? power % 3 : power];
  return `${Number(`1e${kept}`)}${unit}`;
}

function add(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  set(element, attributes);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}
