// The tab "Decisions": a text and questions with fixed answers; the model says how likely it finds each answer.

import { bars } from "./bars.js";
import { byId, button, h } from "./dom.js";
import { count, percent } from "./format.js";

/** The kinds of questions; `least` and `most` are the numbers of options that each may have. */
const KINDS = {
  predicate: { title: "yes or no", least: 0, most: 0 },
  choice: { title: "one of several", least: 2, most: 64, field: "choices", key: "value" },
  labels: { title: "each by itself", least: 1, most: 64, field: "choices", key: "value" },
  score: { title: "on a scale", least: 2, most: 10, field: "levels", key: "label" },
};
const EXAMPLES = {
  "A complaint": {
    text: "The package came two weeks late, and the screen of the phone was broken. I would like my money back, please.",
    questions: [
      { type: "predicate", instructions: "Does the customer report a damaged item?" },
      { type: "choice", instructions: "Which department should handle this?", options: ["returns", "billing", "technical support"] },
      { type: "labels", instructions: "What is it about?", options: ["delivery", "quality", "price"] },
      { type: "score", instructions: "How upset is the customer?", options: ["calm", "annoyed", "furious"] },
    ],
  },
  "A review": {
    text: "I went in with low hopes and came out humming the songs. The plot is thin, but the two leads carry it.",
    questions: [
      { type: "choice", instructions: "Is this review positive or negative?", options: ["positive", "negative"] },
      { type: "score", instructions: "How many stars would the writer give?", options: ["one", "two", "three", "four", "five"] },
    ],
  },
  "A story": {
    text: "One cold evening, Ned the mole was in the castle. He found a white ball there. Then he lost it in the forest.",
    questions: [
      { type: "choice", instructions: "Is Ned happy or sad? Ned is", options: ["happy", "sad"] },
      { type: "choice", instructions: "Where is the ball? The ball is in the", options: ["castle", "forest", "barn"] },
    ],
  },
};

export class Decisions {
  constructor(app) {
    this.app = app;
    this.questions = []; // {type, instructions, options: text, one a line, answer: element}
    this.controller = null;
    this.text = h("textarea", { id: "decisions-text", rows: 4, dir: "auto" });
    this.list = h("div", { class: "questions" });
    this.addButton = button("Add a question", "plus", () => this.#add({ type: "predicate", instructions: "" }, true));
    this.runButton = h("button", { class: "button primary" }, "Decide");
    this.status = h("p", { class: "help", role: "status" });
    const examples = Object.entries(EXAMPLES).map(([name, example]) => h("button", { type: "button", class: "chip", onclick: () => this.#load(example) }, name));
    this.form = h("form", { class: "ask", onsubmit: (event) => {
      event.preventDefault();
      this.#run();
    }, onkeydown: (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.form.requestSubmit();
    } },
      h("label", { for: "decisions-text" }, "The text to decide about"),
      this.text,
      (this.examples = h("div", { class: "chips", role: "group", "aria-label": "Examples" }, examples)),
      this.list,
      h("div", { class: "ask-foot" }, this.addButton, this.status, this.runButton),
    );
    byId("decisions").append(this.form);
    this.#load(EXAMPLES["A complaint"]);
    app.onModel(() => this.#modelChanged());
  }

  shown() {}

  /** Stops a request under way. Returns whether there was one. */
  escape() {
    const isBusy = this.runButton.classList.contains("busy");
    this.controller?.abort();
    this.runButton.classList.remove("busy");
    if (isBusy) this.#say("Stopped.");
    return isBusy;
  }

  /** The labels of a model with a classification head, which are the only options that it has. */
  get #labels() {
    return this.app.facts.labels ?? [];
  }

  #modelChanged() {
    const can = this.app.can("decisions");
    const isFixed = this.#labels.length > 0;
    this.runButton.disabled = !can;
    this.addButton.hidden = isFixed;
    this.examples.hidden = isFixed;
    this.status.textContent = can ? "" : "This model takes no decisions.";
    if (isFixed) {
      this.list.replaceChildren();
      this.questions = [];
      this.#add({ type: "choice", instructions: "Which label fits?", options: this.#labels });
    }
  }

  #load({ text, questions }) {
    this.text.value = text;
    this.list.replaceChildren();
    this.questions = [];
    questions.forEach((question) => this.#add(question));
  }

  #add({ type, instructions, options = [] }, focus = false) {
    const isFixed = this.#labels.length > 0;
    const id = `question-${Math.random().toString(36).slice(2)}`;
    const question = { answer: h("div", { class: "answer", role: "group", "aria-label": "Answer" }) };
    question.type = h("select", { id: `${id}-type`, disabled: isFixed, onchange: () => show() },
      Object.entries(KINDS).map(([name, { title }]) => h("option", { value: name }, title)));
    question.instructions = h("textarea", { id: `${id}-instructions`, rows: 2, dir: "auto", required: true, disabled: isFixed });
    question.options = h("textarea", { id: `${id}-options`, rows: Math.max(3, Math.min(6, options.length)), dir: "auto", disabled: isFixed });
    const optionsLabel = h("label", { for: `${id}-options` });
    const optionsField = h("div", { class: "field" }, optionsLabel, question.options);
    question.type.value = type;
    question.instructions.value = instructions;
    question.options.value = options.join("\n");
    const show = () => {
      optionsField.hidden = KINDS[question.type.value].most === 0;
      optionsLabel.textContent = question.type.value === "score" ? "Levels, from low to high, one a line" : "Answers, one a line";
    };
    const remove = button("Remove the question", "close", () => {
      this.questions.splice(this.questions.indexOf(question), 1);
      question.element.remove();
      this.addButton.focus();
    }, { quiet: true });
    question.element = h("fieldset", { class: "question" },
      h("legend", { class: "visually-hidden" }, "Question"),
      h("div", { class: "question-asked" },
        h("div", { class: "question-head" },
          h("div", { class: "field grow" }, h("label", { for: `${id}-instructions` }, "Question"), question.instructions),
          isFixed ? null : remove,
        ),
        h("div", { class: "question-kind" }, h("label", { for: `${id}-type` }, "Answered"), question.type),
        optionsField,
      ),
      question.answer,
    );
    show();
    this.questions.push(question);
    this.list.append(question.element);
    if (focus) question.instructions.focus();
  }

  async #run() {
    this.controller?.abort();
    this.controller = new AbortController();
    for (const { answer } of this.questions) answer.replaceChildren();
    let body;
    try {
      body = this.#body();
    } catch (error) {
      this.#say(error.message, true);
      return;
    }
    this.runButton.classList.add("busy");
    this.#say("The model reads …");
    try {
      const started = performance.now();
      const { answers, usage } = await this.app.api.decisions(body, this.controller.signal);
      this.questions.forEach((question, index) => question.answer.replaceChildren(shownAnswer(answers[index])));
      const seconds = (performance.now() - started) / 1000;
      this.#say(`${count(usage.input_tokens, "token")} read in ${seconds.toFixed(2)} s, none written.`);
    } catch (error) {
      if (error.name === "AbortError") return; // stopped, or another run took over
      if (error.status === 401) this.app.report(error);
      this.#say(error.message, true);
    }
    this.runButton.classList.remove("busy");
  }

  /** Returns the request. Throws an Error that says in a sentence what a question lacks. */
  #body() {
    if (this.text.value.trim() === "") throw new Error("Write a text to decide about.");
    if (!this.questions.length) throw new Error("Add a question.");
    const questions = this.questions.map(({ type: { value: type }, instructions, options }, index) => {
      const kind = KINDS[type];
      const question = { type, instructions: instructions.value };
      if (kind.most === 0) return question;
      const texts = options.value.split("\n").map((text) => text.trim()).filter(Boolean);
      const twice = texts.find((text, at) => texts.indexOf(text) !== at);
      if (twice !== undefined) throw new Error(`Question ${index + 1} has the answer “${twice}” twice.`);
      if (texts.length < kind.least || texts.length > kind.most) {
        throw new Error(`Question ${index + 1} has ${count(texts.length, "answer")}; it needs ${kind.least} to ${kind.most}, one a line.`);
      }
      return { ...question, [kind.field]: texts.map((text) => ({ [kind.key]: text })) };
    });
    return { model: this.app.model.id, input: this.text.value, questions };
  }

  #say(text, isBad = false) {
    this.status.textContent = text;
    this.status.classList.toggle("bad", isBad);
  }
}

/** Returns an answer as bars, and in words. */
function shownAnswer(answer) {
  if (answer.type === "predicate") {
    const { probability } = answer;
    const entries = [{ label: "yes", probability, kind: probability >= 0.5 ? "real" : "" }, { label: "no", probability: 1 - probability, kind: probability < 0.5 ? "real" : "" }];
    return h("div", {}, bars(entries, "Probabilities of yes and no"));
  }
  const shown = answer.probabilities.map(({ value, label, probability }) => ({ label: String(label ?? value), probability }));
  const best = Math.max(...shown.map(({ probability }) => probability));
  for (const entry of shown) if (answer.type === "labels" ? entry.probability >= 0.5 : entry.probability === best) entry.kind = "real";
  const words = {
    choice: () => `“${answer.choice}”, with a confidence of ${percent(answer.confidence)}: 0% were all answers equally likely, 100% is certainty.`,
    labels: () => "Each answer is a yes or no of its own: together they need not make 100%.",
    score: () => `On average at ${answer.score.toFixed(2)} of a scale from 0 (${shown[0].label}) to ${shown.length - 1} (${shown.at(-1).label}).`,
  }[answer.type];
  return h("div", {}, bars(shown, "Probabilities of the answers"), h("p", { class: "help", dir: "auto" }, words()));
}
