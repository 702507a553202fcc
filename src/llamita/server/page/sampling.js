// The controls of sampling: what each does in a sentence, its range, and what it is unless changed.

import { h, icon } from "./dom.js";

export const CONTROLS = [
  { name: "temperature", title: "Temperature", least: 0, most: 2, step: 0.05, usual: 1,
    help: "How freely the next token is drawn. 0 always takes the likeliest; above 1 takes unlikely ones more often." },
  { name: "top_p", title: "Top-p", least: 0.01, most: 1, step: 0.01, usual: 1,
    help: "Draws only from the fewest tokens that together have this probability. 1 keeps all." },
  { name: "top_k", title: "Top-k", least: 0, most: 200, step: 1, usual: 0,
    help: "Draws only from so many of the likeliest tokens. 0 keeps all." },
  { name: "min_p", title: "Min-p", least: 0, most: 1, step: 0.01, usual: 0,
    help: "Leaves out tokens less likely than this share of the likeliest one. 0 keeps all." },
  { name: "repetition_penalty", title: "Repetition penalty", least: 0.5, most: 2, step: 0.05, usual: 1,
    help: "Above 1, tokens that already occurred become less likely. 1 changes nothing." },
];
/** Drawn from plainly, a small model wanders off; these keep it to what it finds likely. */
export const SUGGESTED = { temperature: 0.7, top_p: 0.95 };
const NUMBERS = [
  { name: "max_tokens", title: "Most tokens", least: 1, placeholder: "as the server has it",
    help: "An answer ends here even if it is not finished." },
  { name: "seed", title: "Seed", least: 0, placeholder: "random",
    help: "The same seed and the same settings give the same answer." },
];

/** The panel of sampling controls; `onChange` is given the values that differ from the model's defaults. */
export class SamplingPanel {
  constructor(root, onChange) {
    this.onChange = onChange;
    this.mode = null; // a setting that is shown elsewhere, and kept
    this.defaults = {};
    this.fields = new Map();
    for (const control of CONTROLS) root.append(this.#slider(control));
    root.append(h("div", { class: "pair" }, NUMBERS.map((control) => this.#number(control))));
    this.thinking = h("select", { id: "thinking", onchange: () => this.#changed() },
      h("option", { value: "" }, "as the model has it"),
      h("option", { value: "on" }, "yes"),
      h("option", { value: "off" }, "no"),
    );
    this.thinkingField = h("div", { class: "field" },
      h("label", { for: "thinking" }, "Reason first"),
      this.thinking,
      h("p", { class: "help" }, "Whether the model writes its reasoning before the answer."),
    );
    root.append(this.thinkingField);
    this.reset = h("button", { type: "button", class: "button", onclick: () => this.#reset() }, icon("undo"), "Back to the defaults");
    root.append(this.reset);
  }

  /** Shows the settings of a conversation over the defaults of a model. */
  show(settings, defaults, { reasoning = false } = {}) {
    this.defaults = defaults;
    this.mode = settings.mode ?? null;
    this.thinkingField.hidden = !reasoning;
    this.thinking.value = settings.thinking ?? "";
    for (const [name, { set }] of this.fields) set(settings[name] ?? this.#default(name));
    this.reset.disabled = Object.keys(settings).every((name) => name === "mode");
  }

  #default(name) {
    const usual = CONTROLS.find((control) => control.name === name)?.usual;
    return this.defaults[name] ?? usual ?? null;
  }

  #changed() {
    const settings = this.mode ? { mode: this.mode } : {};
    for (const [name, { get }] of this.fields) {
      const value = get();
      if (value !== null && value !== this.#default(name)) settings[name] = value;
    }
    if (this.thinking.value) settings.thinking = this.thinking.value;
    this.reset.disabled = Object.keys(settings).every((name) => name === "mode");
    this.onChange(settings);
  }

  #reset() {
    const settings = this.mode ? { mode: this.mode } : {};
    this.show(settings, this.defaults, { reasoning: !this.thinkingField.hidden });
    this.onChange(settings);
  }

  #slider({ name, title, least, most, step, help }) {
    const id = `sampling-${name}`;
    const limits = { min: least, max: most, step };
    const slide = h("input", { type: "range", ...limits, "aria-label": title, "aria-describedby": `${id}-help`, tabindex: -1 });
    const exact = h("input", { type: "number", id, min: least, step: "any", inputmode: "decimal", "aria-describedby": `${id}-help` });
    slide.addEventListener("input", () => {
      exact.value = slide.value;
      this.#changed();
    });
    exact.addEventListener("change", () => {
      if (exact.value === "") exact.value = this.#default(name);
      slide.value = exact.value;
      this.#changed();
    });
    this.fields.set(name, {
      get: () => (exact.value === "" ? null : Number(exact.value)),
      set: (value) => {
        exact.value = value;
        slide.value = value;
      },
    });
    return h("div", { class: "field" },
      h("div", { class: "field-head" }, h("label", { for: id }, title), exact),
      slide,
      h("p", { class: "help", id: `${id}-help` }, help),
    );
  }

  #number({ name, title, least, placeholder, help }) {
    const id = `sampling-${name}`;
    const input = h("input", { type: "number", id, min: least, step: 1, placeholder, inputmode: "numeric", "aria-describedby": `${id}-help`, onchange: () => this.#changed() });
    this.fields.set(name, {
      get: () => (input.value === "" ? null : Number(input.value)),
      set: (value) => (input.value = value ?? ""),
    });
    return h("div", { class: "field" }, h("label", { for: id }, title), input, h("p", { class: "help", id: `${id}-help` }, help));
  }
}

/** Returns the fields of a request that settings stand for; what is no setting of ours is left out. */
export function requestFields(settings) {
  const names = [...CONTROLS, ...NUMBERS].map(({ name }) => name);
  const fields = Object.fromEntries(names.filter((name) => Number.isFinite(settings[name])).map((name) => [name, settings[name]]));
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return fields;
}

/** The parameters of a text that goes on, where nothing else is set: without them, a server stops after 16 tokens. */
export const CONTINUED = { max_tokens: 128 };

/** Whether a model's defaults change nothing, so that its own distribution is drawn from. */
export function isPlain(defaults) {
  return CONTROLS.every(({ name, usual }) => (defaults[name] ?? usual) === usual);
}

/** Returns all of the parameters that an answer is drawn with, for the record. */
export function effective(settings, defaults) {
  const usual = Object.fromEntries(CONTROLS.map(({ name, usual: value }) => [name, value]));
  const known = Object.fromEntries(Object.entries(defaults).filter(([, value]) => value !== null));
  return { ...usual, ...known, ...requestFields(settings) };
}
