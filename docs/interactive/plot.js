"use strict";

// A plot of curves, dots and bars in an svg element, in the colours of page.css.

const FRAME = { width: 480, height: 300, left: 58, right: 22, top: 34, bottom: 44 };

/**
 * Draws a plot into the svg of this id.
 *
 * x, y: {min, max, ticks, log, label}; marks: {kind: "line" | "dashed" | "dot" | "bar", color,
 * points: [[x, y], ...], name}. Named marks are in the legend. `words` tells the picture.
 */
function plot(id, { x, y, marks, words }) {
  const { width, height, left, right, top, bottom } = FRAME;
  const share = (value, { min, max, log }) =>
    log ? Math.log(value / min) / Math.log(max / min) : (value - min) / (max - min);
  const across = (value) => left + (width - left - right) * share(value, x);
  const down = (value) => height - bottom - (height - top - bottom) * share(value, y);
  const svg = document.getElementById(id);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", words);
  svg.replaceChildren(
    ...axes(x, y, across, down),
    ...marks.flatMap((mark) => drawn(mark, x, y, across, down)),
  );
  legend(svg, marks);
  tell(words);
}

/** Grid lines, their numbers, and the labels of both axes. */
function axes(x, y, across, down) {
  const { width, height, left, right, top, bottom } = FRAME;
  const line = (x1, x2, y1, y2) => element("line", { class: "grid", x1, x2, y1, y2 });
  const middle = (top + height - bottom) / 2;
  return [
    ...x.ticks.flatMap((value) => [
      line(across(value), across(value), top, height - bottom),
      element("text", { x: across(value), y: height - bottom + 17 }, shown(value)),
    ]),
    ...y.ticks.flatMap((value) => [
      line(left, width - right, down(value), down(value)),
      element("text", { class: "end", x: left - 6, y: down(value) + 4 }, shown(value)),
    ]),
    element("text", { x: (left + width - right) / 2, y: height - 8 }, x.label),
    element("text", { x: -middle, y: 13, transform: "rotate(-90)" }, y.label),
  ];
}

/** The elements of a mark; points outside of the axes are left out. */
function drawn({ kind, color, points }, x, y, across, down) {
  const holds = ({ min, max }, value) => value >= min - 1e-9 && value <= max + 1e-9;
  const inside = points.filter(([a, b]) => holds(x, a) && holds(y, b));
  if (kind === "dot") {
    return inside.map(([a, b]) =>
      element("circle", { class: `fill-${color}`, cx: across(a), cy: down(b), r: 5 }),
    );
  }
  if (kind === "bar") {
    return inside.map(([a, b]) => {
      const ends = { x1: across(a), x2: across(a), y1: down(y.min), y2: down(b) };
      return element("line", { class: `bar ${color}`, ...ends });
    });
  }
  const path = inside.map(([a, b]) => `${across(a).toFixed(1)},${down(b).toFixed(1)}`);
  return path.length > 1
    ? [element("path", { class: `${kind} ${color}`, d: `M${path.join("L")}` })]
    : [];
}

/** The names of the marks in one line above the plot. */
function legend(svg, marks) {
  let place = 10;
  for (const { kind, color, name } of marks.filter((mark) => mark.name)) {
    const text = element("text", { class: "start", x: place + 27, y: 18 }, name);
    const sign =
      kind === "dot" || kind === "bar"
        ? element("circle", { class: `fill-${color}`, cx: place + 12, cy: 14, r: 5 })
        : element("path", { class: `${kind} ${color}`, d: `M${place},14h22` });
    svg.append(sign, text);
    place += 27 + text.getComputedTextLength() + 12;
  }
}

/** Round numbers from `low` to `high`, at most ten. */
function ticks(low, high) {
  const size = [1, 2, 5, 10].find((candidate) => (high - low) / candidate <= 9);
  const first = Math.ceil(low / size);
  return Array.from({ length: Math.floor(high / size) - first + 1 }, (_, i) => (first + i) * size);
}
