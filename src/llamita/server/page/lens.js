// What the model would predict if it ended after each layer (the logit lens): a table of layers and positions.

import { bars } from "./bars.js";
import { h } from "./dom.js";
import { percent, quoted, visible } from "./format.js";
import { cellAt, drawHeat, tint } from "./heat.js";

const COLUMNS = 16; // positions in the table at a time

export class LensView {
  /** `onSelect(position)` is called when a column is chosen. */
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.lens = null; // [layer][position][rank]
    this.position = 0;
    this.first = 0; // position of the table's first column
    this.row = 0; // of the cell that arrow keys move
    this.story = h("p", { class: "story" });
    this.overview = h("canvas", { class: "overview", role: "img", onclick: (event) => onSelect(cellAt(event, this.overview).column) });
    this.overviewBox = h("div", { class: "overview-box" }, this.overview, (this.mark = h("div", { class: "column-mark" })));
    this.overviewHelp = h("p", { class: "help" }, "All of the text, a column a token, from the embedding at the top to the last layer: the stronger the colour, the surer. Click to move the table there.");
    this.table = h("table", { class: "lens", role: "grid", "aria-label": "Prediction of each layer at each position", onkeydown: (event) => this.#key(event), onclick: (event) => this.#click(event), onpointerover: (event) => this.#hover(event), onpointerleave: () => this.#detail(this.row, this.position), onfocusin: (event) => this.#hover(event) });
    this.detail = h("div", { class: "detail" });
    this.element = h("div", {}, this.story, this.overviewBox, this.overviewHelp, h("div", { class: "lens-scroll" }, this.table), this.detail);
  }

  /** Shows `lens[layer][position]`, the likeliest tokens {id, text, logprob} from the embedding (row 0) to the model's own. */
  show(lens, tokens) {
    this.lens = lens;
    this.tokens = tokens;
    this.row = lens.length - 1;
    const isLong = tokens.length > COLUMNS;
    this.overviewBox.hidden = !isLong;
    this.overviewHelp.hidden = !isLong;
    this.#window(true);
    this.redraw();
  }

  select(position) {
    this.position = position;
    if (!this.lens) return;
    this.#window();
    for (const cell of this.table.querySelectorAll("[data-position]")) cell.classList.toggle("chosen", Number(cell.dataset.position) === position);
    this.#reveal(position);
    this.mark.style.left = `${(position / this.tokens.length) * 100}%`;
    this.mark.style.width = `${100 / this.tokens.length}%`;
    this.#tell();
    this.#detail(this.row, position);
  }

  redraw() {
    if (!this.lens) return;
    if (this.tokens.length > COLUMNS) {
      drawHeat(this.overview, this.lens.map((row) => row.map((best) => Math.exp(best[0].logprob))));
      this.overview.setAttribute("aria-label", "Probability of the likeliest token, for each layer and position");
    }
    this.select(this.position);
  }

  /** Builds the table for the positions around the selected one, if they are not in it. */
  #window(always = false) {
    const isInside = this.position >= this.first && this.position < this.first + COLUMNS;
    if (isInside && !always) return;
    this.first = Math.max(0, Math.min(this.tokens.length - COLUMNS, this.position - Math.floor(COLUMNS * 0.75)));
    const positions = this.tokens.map((_, position) => position).slice(this.first, this.first + COLUMNS);
    const head = h("tr", {}, h("th", { scope: "col", class: "corner" }, "after"), positions.map((position) =>
      h("th", { scope: "col", "data-position": position, dir: "auto" }, visible(this.tokens[position].text))));
    const rows = this.lens.map((row, layer) => h("tr", { class: layer === this.lens.length - 1 ? "own" : "" },
      h("th", { scope: "row" }, layer === 0 ? "embedding" : layer === this.lens.length - 1 ? `layer ${layer} (last)` : `layer ${layer}`),
      positions.map((position) => this.#cell(row[position], layer, position))));
    this.table.replaceChildren(h("thead", {}, head), h("tbody", {}, rows));
  }

  #cell(best, layer, position) {
    const probability = Math.exp(best[0].logprob);
    const cell = h("td", { role: "gridcell", "data-position": position, "data-row": layer, tabindex: -1, dir: "auto", "aria-label": `${visible(best[0].text)} ${percent(probability)}` }, visible(best[0].text));
    tint(cell, probability);
    return cell;
  }

  /** Moves the table sideways, no other scroll, until a column can be seen beside the names of the layers. */
  #reveal(position) {
    const box = this.table.parentElement;
    const column = this.table.querySelector(`thead [data-position="${position}"]`);
    const names = this.table.querySelector(".corner").offsetWidth;
    if (column.offsetLeft - names < box.scrollLeft) box.scrollLeft = column.offsetLeft - names;
    const right = column.offsetLeft + column.offsetWidth;
    if (right > box.scrollLeft + box.clientWidth) box.scrollLeft = right - box.clientWidth;
  }

  /** Says from which layer on the model holds to its prediction. */
  #tell() {
    const last = this.lens.length - 1;
    const own = this.lens[last][this.position][0];
    let since = last;
    while (since > 0 && this.lens[since - 1][this.position][0].id === own.id) since -= 1;
    const when = since === last ? "only its last layer turns to" : since === 0 ? "already the embedding points to" : `from layer ${since} on it holds to`;
    this.story.textContent = `After ${quoted(this.tokens[this.position].text)}, ${when} ${quoted(own.text)}, with ${percent(Math.exp(own.logprob))} in the end.`;
  }

  #detail(row, position) {
    const name = row === 0 ? "the embedding" : `layer ${row}`;
    const best = this.lens[row][position];
    const entries = best.map(({ text, logprob }) => ({ label: visible(text), probability: Math.exp(logprob) }));
    this.detail.replaceChildren(
      h("h4", {}, `After ${name}, at `, h("q", {}, visible(this.tokens[position].text))),
      bars(entries, "Likeliest tokens there"),
    );
    for (const cell of this.table.querySelectorAll("td")) cell.tabIndex = Number(cell.dataset.row) === this.row && Number(cell.dataset.position) === this.position ? 0 : -1;
  }

  #hover(event) {
    const cell = event.target.closest("td");
    if (cell) this.#detail(Number(cell.dataset.row), Number(cell.dataset.position));
  }

  #click(event) {
    const cell = event.target.closest("[data-position]");
    if (!cell) return;
    if (cell.dataset.row) this.row = Number(cell.dataset.row);
    this.onSelect(Number(cell.dataset.position));
  }

  #key(event) {
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [down, right] = moves[event.key];
    this.row = Math.max(0, Math.min(this.lens.length - 1, this.row + down));
    this.onSelect(Math.max(0, Math.min(this.tokens.length - 1, this.position + right)));
    this.table.querySelector(`td[data-row="${this.row}"][data-position="${this.position}"]`)?.focus();
  }
}
