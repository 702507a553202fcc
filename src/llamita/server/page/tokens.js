// A row of tokens as coloured pieces, one of which is selected: by pointing, by a click, by arrow keys.

import { h } from "./dom.js";
import { visible } from "./format.js";
import { tint } from "./heat.js";

const COLOURS = 5; // of the style sheet, in turn
const WITH_IDS = 96; // more tokens than this are shown without their ids

export class TokenRow {
  /** `onSelect(position)` is called with the position that is pointed at, or that was chosen where none is. */
  constructor(label, onSelect) {
    this.onSelect = onSelect;
    this.pieces = [];
    this.chosen = 0;
    this.element = h("div", {
      class: "tokens",
      role: "listbox",
      "aria-label": label,
      "aria-orientation": "horizontal",
      onkeydown: (event) => this.#key(event),
      onclick: (event) => this.#at(event, (position) => this.choose(position)),
      onpointerover: (event) => event.pointerType === "mouse" && this.#at(event, (position) => this.#point(position)),
      onpointerleave: () => this.#point(this.chosen),
    });
  }

  show(tokens, chosen) {
    this.pieces = tokens.map(({ id, text }, position) =>
      h("span", { class: `token colour-${position % COLOURS}`, role: "option", "data-position": position, title: `${position + 1}: ${visible(text)}, id ${id}`, tabindex: -1 },
        h("span", { class: "piece" }, visible(text)),
        tokens.length <= WITH_IDS && h("span", { class: "id" }, String(id)),
      ),
    );
    this.element.classList.toggle("small", tokens.length > WITH_IDS);
    this.element.replaceChildren(...this.pieces);
    this.choose(chosen);
  }

  /** Chooses a position for as long as none is pointed at. */
  choose(position) {
    this.chosen = position;
    this.reveal(position);
    this.#point(position);
  }

  /** Scrolls the row, and nothing else, until a position is in view. */
  reveal(position) {
    const { offsetTop: top, offsetHeight: height } = this.pieces[position];
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop || top + height > scrollTop + clientHeight) this.element.scrollTop = top - clientHeight / 2;
  }

  /** Marks a position, without telling anyone. */
  mark(position) {
    this.pieces.forEach((piece, index) => {
      piece.setAttribute("aria-selected", index === position);
      piece.tabIndex = index === this.chosen ? 0 : -1;
    });
  }

  /** Tints each token by a weight from 0 to 1; those after the last weight stay pale. */
  tint(weights) {
    this.pieces.forEach((piece, index) => {
      piece.classList.add("tinted");
      piece.classList.toggle("beyond", index >= weights.length);
      tint(piece, weights[index] ?? 0);
    });
  }

  #point(position) {
    this.onSelect(position);
  }

  #at(event, act) {
    const piece = event.target.closest("[data-position]");
    if (piece) act(Number(piece.dataset.position));
  }

  #key(event) {
    const last = this.pieces.length - 1;
    const targets = { ArrowRight: this.chosen + 1, ArrowDown: this.chosen + 1, ArrowLeft: this.chosen - 1, ArrowUp: this.chosen - 1, Home: 0, End: last };
    if (!(event.key in targets)) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, targets[event.key])));
    this.pieces[this.chosen].focus();
  }
}
