// One message of a conversation as an element: its text, its reasoning, its calls of tools, how it was made, what can be done.

import { button, h, icon } from "./dom.js";
import { count, duration } from "./format.js";
import { Markdown } from "./markdown.js";

export class MessageView {
  /**
   * `actions` are functions of the message: copy, edit (text), again, answerCalls (texts). While the message is being
   * written, `isOpen`, `grow` adds to it and `finish` ends it.
   */
  constructor(message, actions, { isOpen = false } = {}) {
    this.message = message;
    this.actions = actions;
    const isUser = message.role === "user";
    const name = { user: "You", assistant: message.model ?? "The model", tool: "Result of a tool" }[message.role];
    this.text = h("div", { class: "text" });
    this.extras = h("div", { class: "extras" });
    this.meter = h("p", { class: "meter" });
    this.buttons = h("div", { class: "actions" });
    this.reasoningText = h("div", { class: "text" });
    this.reasoningTitle = h("summary", {}, "Reasoning");
    this.reasoning = h("details", { class: "reasoning", hidden: true }, this.reasoningTitle, this.reasoningText);
    this.element = h("article", { class: `message ${message.role}`, "aria-label": name, tabindex: -1 },
      isUser ? null : h("p", { class: "who" }, name),
      this.reasoning, this.text, this.extras,
      h("div", { class: "message-foot" }, this.meter, this.buttons),
    );
    this.isPlain = message.role !== "assistant" || message.continued;
    if (this.isPlain) {
      this.text.classList.add("plain");
      this.text.dir = "auto";
      this.text.append((this.plainText = document.createTextNode("")));
    }
    this.answerMarkdown = this.isPlain ? null : new Markdown(this.text);
    this.reasoningMarkdown = new Markdown(this.reasoningText);
    this.shown = { content: 0, reasoning: 0 }; // characters
    this.isOpen = isOpen;
    if (isOpen) {
      this.element.classList.add("open");
      this.grow();
    } else {
      this.finish();
    }
  }

  /** Shows what was added to the message since the last call. */
  grow() {
    const { content, reasoning = "" } = this.message;
    if (reasoning.length > this.shown.reasoning) {
      this.reasoning.hidden = false;
      this.reasoningMarkdown.append(reasoning.slice(this.shown.reasoning));
      this.reasoningTitle.textContent = content ? "Reasoning" : "Reasoning …";
    }
    if (content.length > this.shown.content) {
      const added = content.slice(this.shown.content);
      if (this.isPlain) this.plainText.appendData(added);
      else this.answerMarkdown.append(added);
      this.reasoningTitle.textContent = "Reasoning";
    }
    this.shown = { content: content.length, reasoning: reasoning.length };
    this.element.classList.toggle("waiting", !content && !reasoning && this.isOpen);
    if (this.message.tool_calls && this.isOpen) this.#showExtras();
  }

  /** Shows the message as it is in the end. */
  finish({ isLast = false } = {}) {
    this.grow();
    this.answerMarkdown?.finish();
    this.reasoningMarkdown.finish();
    this.isOpen = false;
    this.element.classList.remove("open", "waiting");
    this.reasoningTitle.textContent = "Reasoning";
    this.meter.textContent = meterText(this.message);
    this.meter.title = meterDetails(this.message);
    this.setLast(isLast);
    this.#showButtons();
  }

  /** The last message offers more: the results of its calls can be given. */
  setLast(isLast) {
    this.isLast = isLast;
    this.#showExtras();
  }

  #showExtras() {
    const { tool_calls: calls = [], error, finish_reason: reason, content, reasoning, continued } = this.message;
    const parts = calls.map((call) => toolCall(call));
    if (this.isLast && calls.length && !error) parts.push(this.#resultForm(calls));
    const nothing = this.message.role === "assistant" && !this.isOpen && !content && !reasoning && !calls.length && !error;
    if (nothing) parts.push(h("p", { class: "note" }, this.message.stopped ? "Stopped before the first word." : "The model ended its answer at once, without a word."));
    if (reason === "length" && !continued) parts.push(h("p", { class: "note" }, "The answer reached the most tokens it may have, and is not finished."));
    if (error) parts.push(h("p", { class: "note bad", role: "alert" }, error));
    this.extras.replaceChildren(...parts);
  }

  #showButtons() {
    const { role, error } = this.message;
    const buttons = [button("Copy", "copy", () => this.actions.copy(this.message), { quiet: true })];
    if (role !== "tool") buttons.push(button("Edit", "edit", () => this.#edit(), { quiet: true }));
    if (role === "assistant") buttons.push(button(error ? "Try again" : "Write it again", "again", () => this.actions.again(this.message), { quiet: !error }));
    this.buttons.replaceChildren(...buttons);
  }

  #edit() {
    const isUser = this.message.role === "user";
    const area = h("textarea", { dir: "auto", "aria-label": "The message's text", rows: 3 });
    area.value = this.message.content;
    const close = () => {
      form.replaceWith(this.text);
      this.element.classList.remove("editing");
      this.buttons.querySelector("button")?.focus();
    };
    const form = h("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      close();
      if (isUser || area.value !== this.message.content) this.actions.edit(this.message, area.value);
    }, onkeydown: (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    } },
      area,
      h("div", { class: "edit-foot" },
        h("p", { class: "help" }, isUser ? "What follows is replaced by a new answer." : "The model will read this text as its own."),
        h("button", { type: "button", class: "button", onclick: close }, "Leave it"),
        h("button", { class: "button primary" }, isUser ? "Send" : "Keep"),
      ),
    );
    this.element.classList.add("editing");
    this.text.replaceWith(form);
    area.focus();
    area.style.height = `${Math.min(area.scrollHeight + 4, 400)}px`;
  }

  #resultForm(calls) {
    const areas = calls.map((call) => h("textarea", { rows: 2, dir: "auto", "aria-label": `Result of ${call.function.name}`, placeholder: `What ${call.function.name} gives back` }));
    return h("form", { class: "results", onsubmit: (event) => {
      event.preventDefault();
      this.actions.answerCalls(this.message, areas.map((area) => area.value));
    } },
      h("p", { class: "help" }, "This page runs no tools: write what they would give back, and the model goes on."),
      ...areas,
      h("button", { class: "button" }, icon("send"), h("span", {}, "Send the result")),
    );
  }
}

function toolCall(call) {
  let text = call.function.arguments;
  try {
    text = JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    // Not complete yet, or never: shown as it came.
  }
  return h("div", { class: "call" },
    h("p", {}, icon("tool"), "Calls ", h("code", { dir: "auto" }, call.function.name)),
    h("pre", { dir: "ltr", tabindex: 0, role: "region", "aria-label": "Arguments" }, h("code", {}, text)),
  );
}

/** Returns how an answer was made, in a line. */
function meterText({ usage, timings, stopped, role }) {
  if (role !== "assistant") return "";
  const parts = [];
  if (usage) parts.push(count(usage.completion_tokens ?? 0, "token"));
  if (timings?.tokens_per_second > 0) parts.push(`${timings.tokens_per_second.toFixed(1)} tokens/s`);
  const first = firstToken(timings);
  if (first !== null) parts.push(`first token after ${duration(first)}`);
  if (stopped) parts.push("stopped");
  return parts.join(" · ");
}

function meterDetails({ usage, timings }) {
  if (!usage || !timings) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const lines = [`Prompt: ${count(usage.prompt_tokens, "token")}${cached ? `, ${cached} of them read before` : ""}`];
  const named = [["Waiting", "queue_seconds"], ["Reading the prompt", "prefill_seconds"], ["Writing", "decode_seconds"]];
  for (const [name, key] of named) if (Number.isFinite(timings[key])) lines.push(`${name}: ${duration(timings[key])}`);
  return lines.join("\n");
}

/** Returns the seconds to the first token: the server's own, or else as seen from here. */
function firstToken(timings) {
  const own = (timings?.queue_seconds ?? NaN) + (timings?.prefill_seconds ?? NaN);
  return Number.isFinite(own) ? own : (timings?.first_seen_seconds ?? null);
}
