// Attention: for each head of a layer, how much each token looks at each token before it.

import { h } from "./dom.js";
import { percent, quoted, visible } from "./format.js";
import { cellAt, drawHeat } from "./heat.js";
import { TokenRow } from "./tokens.js";

const LABELLED = 32; // tokens, at most, for names along the sides of the large picture
const COARSE = 64; // with more, weights are spread so thin that they are drawn stronger, and smoothed when made smaller

export class AttentionView {
  /** `onSelect(position)` is called when a row is chosen, `onLayer(layer)` when another layer is asked for. */
  constructor(onSelect, onLayer) {
    this.onSelect = onSelect;
    this.position = 0;
    this.head = -1; // -1: the mean of all heads
    this.weights = null; // [head][from][to]
    this.layerInput = h("input", { type: "range", id: "attention-layer", min: 1, step: 1, oninput: () => this.#nameLayer(), onchange: () => onLayer(Number(this.layerInput.value) - 1) });
    this.layerName = h("output", { for: "attention-layer" });
    this.grid = h("div", { class: "heads", role: "radiogroup", "aria-label": "Heads", onkeydown: (event) => this.#key(event) });
    this.canvas = h("canvas", { role: "img" });
    this.rowMark = h("div", { class: "row-mark", hidden: true });
    this.rowNames = h("div", { class: "row-names", "aria-hidden": "true" });
    this.columnNames = h("div", { class: "column-names", "aria-hidden": "true" });
    this.plot = h("div", { class: "plot" }, this.columnNames, this.rowNames, h("div", { class: "plot-area" }, this.canvas, this.rowMark));
    this.readout = h("p", { class: "readout" });
    this.looks = new TokenRow("Where the selected token looks", (position) => this.looking(position));
    this.element = h("div", { class: "attention" },
      h("div", { class: "layer-choice" }, h("label", { for: "attention-layer" }, "Layer"), this.layerInput, this.layerName),
      this.grid,
      h("div", { class: "head-large" },
        h("div", {}, this.plot, h("p", { class: "help" }, "Each row is a token that looks, each column one that is looked at; the stronger the colour, the more. A row adds up to 100%. Right of the diagonal lies the future, which no token sees.")),
        h("div", {}, (this.lookTitle = h("h4", {})), this.looks.element, this.readout),
      ),
    );
    this.canvas.addEventListener("pointermove", (event) => this.#hover(event));
    this.canvas.addEventListener("pointerleave", () => this.#describe());
    this.canvas.addEventListener("click", (event) => this.onSelect(cellAt(event, this.canvas).row));
  }

  /** Shows a layer: `weights[head][from][to]`. */
  show(layer, layers, weights, tokens) {
    this.tokens = tokens;
    this.layer = layer;
    this.weights = weights;
    this.mean = tokens.map((_, from) => tokens.map((_, to) => weights.reduce((sum, head) => sum + head[from][to], 0) / weights.length));
    this.layerInput.max = layers;
    this.layerInput.value = layer + 1;
    this.layers = layers;
    this.#nameLayer();
    this.looks.show(tokens, this.position);
    if (this.head >= weights.length) this.head = -1;
    const isLabelled = tokens.length <= LABELLED;
    this.plot.classList.toggle("labelled", isLabelled);
    this.rowNames.replaceChildren(...(isLabelled ? tokens.map(({ text }) => h("span", {}, visible(text))) : []));
    this.columnNames.replaceChildren(...(isLabelled ? tokens.map(({ text }) => h("span", {}, visible(text))) : []));
    this.redraw();
  }

  select(position) {
    this.position = position;
    if (!this.weights) return;
    this.rowNames.querySelectorAll("span").forEach((name, index) => name.classList.toggle("chosen", index === position));
    this.rowMark.hidden = false;
    this.rowMark.style.top = `${(position / this.tokens.length) * 100}%`;
    this.rowMark.style.height = `${100 / this.tokens.length}%`;
    this.looks.tint(this.#map()[position].slice(0, position + 1));
    this.looks.mark(position);
    this.looks.reveal(position);
    this.lookTitle.replaceChildren("Where ", h("q", {}, visible(this.tokens[position].text)), " looks");
    this.#describe();
  }

  redraw() {
    if (!this.weights) return;
    this.grid.classList.toggle("fine", this.tokens.length > COARSE);
    const maps = [[-1, this.mean], ...this.weights.entries()];
    this.grid.replaceChildren(...maps.map(([head, map]) => {
      const canvas = h("canvas", { "aria-hidden": "true" });
      drawHeat(canvas, masked(map), this.#power);
      const isChosen = head === this.head;
      return h("button", { type: "button", class: "head", role: "radio", "aria-checked": String(isChosen), tabindex: isChosen ? 0 : -1, onclick: () => this.#choose(head) },
        canvas, h("span", {}, head < 0 ? "mean" : `head ${head + 1}`));
    }));
    this.#drawLarge();
  }

  /** Says how much the selected token looks at another. */
  looking(position) {
    if (!this.weights || position > this.position) return;
    this.readout.textContent = this.#sentence(this.position, position);
  }

  get #power() {
    return this.tokens.length > COARSE ? 1 / 3 : 1 / 2;
  }

  #map() {
    return this.head < 0 ? this.mean : this.weights[this.head];
  }

  #choose(head) {
    this.head = head;
    [...this.grid.children].forEach((button, index) => {
      button.setAttribute("aria-checked", index - 1 === head);
      button.tabIndex = index - 1 === head ? 0 : -1;
    });
    this.#drawLarge();
  }

  #drawLarge() {
    drawHeat(this.canvas, masked(this.#map()), this.#power);
    this.canvas.setAttribute("aria-label", `Attention of ${this.#headName()} in layer ${this.layer + 1}, ${this.tokens.length} rows and columns`);
    this.select(this.position);
  }

  #headName() {
    return this.head < 0 ? "the mean of all heads" : `head ${this.head + 1}`;
  }

  #nameLayer() {
    this.layerName.textContent = `${this.layerInput.value} of ${this.layers}`;
  }

  #hover(event) {
    const { row, column } = cellAt(event, this.canvas);
    this.readout.textContent = column > row ? "The future: no token looks ahead." : this.#sentence(row, column);
  }

  #sentence(from, to) {
    return `${quoted(this.tokens[from].text)} looks at ${quoted(this.tokens[to].text)}: ${percent(this.#map()[from][to])}.`;
  }

  #describe() {
    const row = this.#map()[this.position].slice(0, this.position + 1);
    const best = row.map((weight, to) => ({ weight, to })).sort((a, b) => b.weight - a.weight).slice(0, 3);
    this.readout.textContent = `Most at ${best.map(({ weight, to }) => `${quoted(this.tokens[to].text)} (${percent(weight)})`).join(", ")}.`;
  }

  #key(event) {
    const targets = { ArrowRight: this.head + 1, ArrowDown: this.head + 1, ArrowLeft: this.head - 1, ArrowUp: this.head - 1, Home: -1, End: this.weights.length - 1 };
    if (!(event.key in targets)) return;
    event.preventDefault();
    this.#choose(Math.max(-1, Math.min(this.weights.length - 1, targets[event.key])));
    this.grid.children[this.head + 1].focus();
  }
}

/** Returns a map without its future, which the picture leaves empty. */
function masked(map) {
  return map.map((row, from) => row.map((weight, to) => (to > from ? NaN : weight)));
}
