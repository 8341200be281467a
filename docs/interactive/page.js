"use strict";

// What the pages share: controls that are kept in the address, and numbers that are shown.

const SVG = "http://www.w3.org/2000/svg";

/** A new element with attributes and children (elements or text). */
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect", "text", "g"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A number as a person reads it: six digits, a minus sign. */
function shown(value) {
  const text =
    Math.abs(value) >= 1e-4 || value === 0
      ? String(Number(value.toPrecision(6)))
      : value.toExponential(4);
  return text.replaceAll("-", "\u2212");
}

/** Shows a value in the output of this id; `data-value` has all of its digits. */
function put(id, value) {
  const output = document.getElementById(id);
  output.dataset.value = String(value);
  output.textContent = shown(value);
}

/** A row of a table: a heading and outputs, each [id, value]. */
function row(heading, ...outputs) {
  const cells = outputs.map(([id, value]) => {
    const attributes = { id, "data-value": String(value), "aria-live": "off" };
    return element("td", {}, element("output", attributes, shown(value)));
  });
  return element("tr", {}, element("th", { scope: "row" }, heading), ...cells);
}

/**
 * Builds the controls in #controls, and calls `render(state)` at the start and at every change.
 *
 * A control has label, min, max, step and value; `log: true` makes its slider go by ratios; `names`
 * makes it a list, one slider for each name; `grow: least` lets a person add and remove entries.
 * The state is kept in the part of the address behind #, so that a link shows what one sees.
 */
function start(controls, render) {
  const state = {};
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, control] of Object.entries(controls)) {
    const numbers = (given.get(name) ?? "").split(",").filter(Boolean).map(Number);
    const most = control.names?.length ?? 1,
      least = control.grow ?? most;
    const usable =
      numbers.length >= least && numbers.length <= most && numbers.every(Number.isFinite);
    const list = usable ? numbers : [control.value].flat();
    const kept = list.map((value) => clamped(value, control));
    state[name] = control.names ? kept : kept[0];
  }
  const changed = () => {
    const parts = Object.entries(state).map(([name, value]) => `${name}=${value}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
    render(state);
  };
  const build = () => {
    const groups = Object.entries(controls).map(([name, control]) =>
      group(name, control, state, changed, build),
    );
    document.getElementById("controls").replaceChildren(...groups);
    changed();
  };
  const back = document.getElementById("back");
  if (back && history.length > 1) {
    back.hidden = false;
    back.addEventListener("click", () => history.back());
  }
  build();
}

function clamped(value, { min, max, whole }) {
  const inside = Math.min(Math.max(value, min), max);
  return whole ? Math.round(inside) : inside;
}

/** The slider of a control, or the sliders of a list in a field set with its buttons. */
function group(name, control, state, changed, build) {
  const box = control.names
    ? element("fieldset", {}, element("legend", {}, control.label))
    : element("div", { class: "single" });
  const list = [state[name]].flat();
  list.forEach((value, i) => {
    const label = control.names ? control.names[i] : control.label;
    const write = (next) => {
      if (control.names) state[name][i] = next;
      else state[name] = next;
      changed();
    };
    box.append(slider(`${name}${control.names ? i : ""}`, label, control, value, write));
  });
  if (control.grow !== undefined) {
    const { entry, grow, names } = control;
    const add = button(`Add ${entry}`, () => state[name].push(0), build);
    const remove = button(`Remove ${entry}`, () => state[name].pop(), build);
    add.disabled = list.length >= names.length;
    remove.disabled = list.length <= grow;
    box.append(element("p", { class: "buttons" }, add, remove));
  }
  return box;
}

/** A button that changes a list. The controls are then built anew, and it keeps the focus. */
function button(text, act, build) {
  const made = element("button", { type: "button" }, text);
  made.addEventListener("click", () => {
    act();
    build();
    [...document.querySelectorAll("button")].find((other) => other.textContent === text).focus();
  });
  return made;
}

/** A slider and a field for the same number, which arrow keys, touch and typing change. */
function slider(id, label, control, value, write) {
  const { min, max, step, log, whole } = control;
  // A logarithmic slider stands at the power of ten of its number.
  const toPlace = log ? Math.log10 : Number;
  const toValue = log ? (place) => Number((10 ** place).toPrecision(3)) : Number;
  const range = element("input", {
    type: "range",
    id,
    min: toPlace(min),
    max: toPlace(max),
    step: log ? 0.01 : step,
  });
  const field = element("input", {
    type: "number",
    "aria-label": `${label}, number`,
    min,
    max,
    step: whole ? 1 : "any",
  });
  const show = (next, but) => {
    if (but !== range) range.value = toPlace(next);
    if (but !== field) field.value = next;
    range.setAttribute("aria-valuetext", String(next));
  };
  const take = (next, from) => {
    value = clamped(next, control);
    show(value, from);
    write(value);
  };
  range.addEventListener("input", () => take(toValue(range.value), range));
  field.addEventListener("input", () => {
    const typed = field.valueAsNumber;
    if (Number.isFinite(typed)) take(typed, field);
  });
  // What was typed and is out of range, or is no number, gives way to the number in use.
  field.addEventListener("change", () => show(value));
  show(value);
  return element("div", { class: "slider" }, element("label", { for: id }, label), range, field);
}

let waiting;

/** Lets a screen reader say what has changed, once a slider is at rest. */
function tell(words) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    document.getElementById("summary").textContent = words;
  }, 500);
}
