// Probabilities as bars, one below the other.

import { h } from "./dom.js";
import { percent } from "./format.js";

/** Returns a list of bars for entries {label, probability, note?, kind?}; label is a string or a node. */
export function bars(entries, description) {
  return h("ul", { class: "bars", "aria-label": description }, entries.map(({ label, probability, note, kind = "" }) => {
    const fill = h("span", { class: "fill" });
    fill.style.width = `${Math.max(0, Math.min(1, probability)) * 100}%`;
    return h("li", { class: kind },
      h("span", { class: "bar-label", dir: "auto" }, label, note ? h("span", { class: "bar-note" }, note) : null),
      h("span", { class: "track", "aria-hidden": "true" }, fill),
      h("span", { class: "bar-value" }, percent(probability)),
    );
  }));
}
