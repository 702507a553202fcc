// The tab "Look inside": a text's tokens, what may come next, where the model looks, what each layer would predict.

import { AttentionView } from "./attention.js";
import { bars } from "./bars.js";
import { byId, h } from "./dom.js";
import { count, percent, quoted, visible } from "./format.js";
import { LensView } from "./lens.js";
import { TokenRow } from "./tokens.js";

const TOP = 8; // likeliest tokens at each position
const LENS_TOP = 5;
const QUICK = 128; // tokens; for longer texts, what takes long is computed when asked for
const EXAMPLES = ["The capital of France is", "When Mary and John went to the store, John gave a drink to", "One cold evening, Ned the mole was in the castle. He found a"];

export class Inside {
  constructor(app) {
    this.app = app;
    this.controller = null; // of the requests under way
    this.layers = new Map(); // attention of the layers already asked for
    this.asked = null; // {model, prompt: ids}
    this.tokenRow = new TokenRow("Tokens of the text", (position) => this.#select(position));
    this.attention = new AttentionView((position) => this.tokenRow.choose(position), (layer) => this.#showLayer(layer));
    this.lens = new LensView((position) => this.tokenRow.choose(position));
    this.next = h("div", {});
    this.#build();
    byId("inside-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("inside-prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("inside-form").requestSubmit();
    });
    byId("inside-examples").append(...EXAMPLES.map((text) => h("button", { type: "button", class: "chip", onclick: () => {
      byId("inside-prompt").value = text;
      byId("inside-chat").checked = false;
      this.#run();
    } }, text)));
    document.addEventListener("themechange", () => {
      this.attention.redraw();
      this.lens.redraw();
    });
    app.onModel(() => this.#modelChanged());
  }

  shown() {}

  /** Stops what is being computed. Returns whether anything was. */
  escape() {
    const isBusy = this.#isBusy;
    this.controller?.abort();
    byId("inside-run").classList.remove("busy");
    byId("inside-result").setAttribute("aria-busy", "false");
    return isBusy;
  }

  get #isBusy() {
    return byId("inside-result").getAttribute("aria-busy") === "true";
  }

  get #canChat() {
    return this.app.can("chat") && this.app.facts.chat;
  }

  #modelChanged() {
    const canLook = this.app.can("look_inside");
    byId("inside-chat-field").hidden = !this.#canChat;
    byId("inside-run").disabled = !canLook;
    byId("inside-help").textContent = canLook ? "Up to 512 tokens. Ctrl+Enter begins." : "This model cannot be looked into.";
  }

  #build() {
    this.parts = {
      tokens: part("Tokens", "A model does not read letters or words but tokens: pieces out of a fixed list, each with a number. Point at one, or move with the arrow keys, to see everything at that place.", this.tokenRow.element),
      next: part("What comes next", "At every position the model gives each token of its list a probability to be the next. These are the likeliest.", this.next),
      attention: part("Where it looks", "In every layer, several heads carry information from earlier tokens to later ones. Each head spreads 100% of its attention over what it can see; many rest on the first token when they look for nothing.", this.attention.element),
      lens: part("How the prediction forms", "The model's layers work on its guess one after another. Each row shows what it would say if it ended there; the last row is what it really says.", this.lens.element),
    };
    this.parts.tokens.element.classList.add("tokens-part"); // its row stays in view while the others are read
  }

  async #run() {
    const text = byId("inside-prompt").value;
    if (text === "" || !this.app.model) return;
    this.controller?.abort();
    this.controller = new AbortController();
    const { signal } = this.controller;
    const isChat = byId("inside-chat").checked && this.#canChat;
    const model = this.app.model.id;
    const result = byId("inside-result");
    result.setAttribute("aria-busy", "true");
    byId("inside-run").classList.add("busy");
    try {
      const prompt = isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
      const found = await this.app.api.lookInside({ model, ...prompt, top: TOP }, signal);
      signal.throwIfAborted();
      this.asked = { model, prompt: found.tokens.map(({ id }) => id) };
      this.found = found;
      this.layers.clear();
      this.attention.weights = null;
      this.lens.lens = null;
      result.replaceChildren(...Object.values(this.parts).map(({ element }) => element));
      for (const { body } of Object.values(this.parts)) body.classList.remove("waiting");
      this.tokenRow.show(found.tokens, found.tokens.length - 1);
      this.app.announce(`${count(found.tokens.length, "token")}. Likeliest next: ${found.next.at(-1)[0].text}`);
      const isQuick = found.tokens.length <= QUICK;
      const middle = Math.floor(found.layers / 2);
      await this.#or(this.parts.attention, isQuick, `Compute the attention of layer ${middle + 1}`, () => this.#showLayer(middle));
      signal.throwIfAborted();
      await this.#or(this.parts.lens, isQuick, "Compute every layer's prediction", () => this.#showLens());
    } catch (error) {
      if (error.name !== "AbortError") {
        if (error.status === 401) this.app.report(error);
        result.replaceChildren(h("p", { class: "note bad", role: "alert" }, error.message));
      }
    } finally {
      if (!signal.aborted) {
        result.setAttribute("aria-busy", "false");
        byId("inside-run").classList.remove("busy");
      }
    }
  }

  /** Does a part at once, or offers to. */
  async #or({ body, content }, atOnce, label, act) {
    if (atOnce) {
      body.replaceChildren(content);
      await act();
      return;
    }
    body.replaceChildren(h("p", { class: "help" }, "For a text of this length it takes a while."), h("button", { type: "button", class: "button", onclick: () => {
      body.replaceChildren(content);
      act();
    } }, label));
  }

  async #showLayer(layer) {
    await this.#into(this.parts.attention, async (signal) => {
      if (!this.layers.has(layer)) {
        const { attention } = await this.app.api.lookInside({ ...this.asked, attention: [layer], top: 1 }, signal);
        this.layers.set(layer, attention[0].weights);
      }
      this.attention.show(layer, this.found.layers, this.layers.get(layer), this.found.tokens);
    });
  }

  async #showLens() {
    await this.#into(this.parts.lens, async (signal) => {
      const { lens } = await this.app.api.lookInside({ ...this.asked, lens: true, top: LENS_TOP }, signal);
      this.lens.show(lens, this.found.tokens);
    });
  }

  async #into({ body, content }, act) {
    body.classList.add("waiting");
    if (this.controller.signal.aborted) this.controller = new AbortController(); // after Escape, another layer may be asked for
    try {
      await act(this.controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") body.replaceChildren(content, h("p", { class: "note bad", role: "alert" }, error.message));
    }
    body.classList.remove("waiting");
  }

  #select(position) {
    if (!this.found) return;
    this.tokenRow.mark(position);
    this.#showNext(position);
    this.attention.select(position);
    this.lens.select(position);
  }

  #showNext(position) {
    const { tokens, next } = this.found;
    const follower = tokens[position + 1];
    const entries = next[position].map(({ id, text, logprob }) => ({
      label: visible(text),
      probability: Math.exp(logprob),
      note: id === follower?.id ? "the text goes on so" : "",
      kind: id === follower?.id ? "real" : "",
    }));
    const rest = 1 - entries.reduce((sum, { probability }) => sum + probability, 0);
    entries.push({ label: "all others together", probability: Math.max(0, rest), kind: "rest" });
    const isListed = next[position].some(({ id }) => id === follower?.id);
    const words = follower
      ? ` The text goes on with ${quoted(follower.text)}${isListed ? "." : `, which is not among the ${next[position].length} likeliest.`}`
      : ` The model would most likely go on with ${quoted(next[position][0].text)} (${percent(entries[0].probability)}).`;
    this.next.replaceChildren(
      h("p", { class: "story" }, `After ${quoted(tokens[position].text)}, token ${position + 1} of ${tokens.length}.${words}`),
      bars(entries, "Probabilities of the next token"),
    );
  }
}

function part(title, words, content) {
  const body = h("div", { class: "part-body" }, content);
  const head = h("div", { class: "part-head" }, h("h3", {}, title), h("p", { class: "explain" }, words));
  const element = h("section", { class: "part" }, head, body);
  return { element, body, content };
}
