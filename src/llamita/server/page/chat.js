// The chat: conversations, their messages, and answers as they stream in.

import { ApiError } from "./api.js";
import { byId, button, copyText, h, saveFile } from "./dom.js";
import { count, size } from "./format.js";
import { remember, remembered } from "./memory.js";
import { MessageView } from "./message.js";
import { CONTINUED, SamplingPanel, effective, requestFields } from "./sampling.js";
import { LARGEST_IMPORT, exported, imported, newConversation } from "./store.js";

const NEAR_END = 80; // pixels from the end at which the view still follows the text
const SAVE_EVERY = 1000; // milliseconds, while an answer is written
const WIDE = matchMedia("(min-width: 70rem)"); // the style sheet has the same width
const STARTERS = ["Why is the sky blue?", "Write a short poem about a llama in the snow.", "Explain what a language model does to a ten-year-old."];
const BEGINNINGS = ["Once upon a time, there was a", "One cold evening, Ned the mole was in the castle. He found"];

export class Chat {
  constructor(app, store) {
    this.app = app;
    this.store = store;
    this.views = new Map(); // from messages of the shown conversation
    this.running = null; // {conversation, message, controller}: one answer at a time
    this.drafts = new Map(); // what was written and not sent, by conversation
    this.sampling = new SamplingPanel(byId("sampling"), (settings) => this.#change({ settings }));
    this.conversation = store.get(remembered("llamita.conversation")) ?? store.conversations[0] ?? this.#fresh();
    this.#listen();
    const showSettings = () => this.toggle("settings", WIDE.matches && remembered("llamita.settings") !== "closed", false);
    showSettings();
    WIDE.addEventListener("change", showSettings); // where there is no room beside the chat any more, they would lie on it
    app.onModel(() => this.#modelChanged());
    this.#show();
  }

  /** Called when the tab comes into view. */
  shown() {
    this.#fitDraft();
  }

  /** Begins a new conversation and goes to the message box. */
  begin() {
    const empty = this.store.conversations.find(({ messages, system }) => !messages.length && !system);
    this.#open(empty ?? this.#fresh());
    this.#close("talks");
    byId("draft").focus();
  }

  /** Stops the answer under way, or closes what lies over the page. Returns whether there was anything to do. */
  escape() {
    if (this.running) {
      this.stop();
      return true;
    }
    const open = WIDE.matches ? [] : ["talks", "settings"].filter((name) => byId(name).classList.contains("open"));
    open.forEach((name) => this.#close(name));
    return open.length > 0;
  }

  stop() {
    this.running?.controller.abort();
  }

  /** Opens or closes the conversations or the settings, which lie beside the chat, or over it where there is no room. */
  toggle(name, isOpen = !byId(name).classList.contains("open"), isChoice = true) {
    byId(name).classList.toggle("open", isOpen);
    for (const opener of document.querySelectorAll(`[data-opens=${name}]`)) opener.setAttribute("aria-expanded", isOpen);
    if (name === "settings" && WIDE.matches && isChoice) remember("llamita.settings", isOpen ? "open" : "closed");
    if (isOpen && !WIDE.matches) byId(name).querySelector("button").focus();
  }

  #close(name) {
    if (name === "talks" && !byId(name).classList.contains("open")) return;
    this.toggle(name, false);
    document.querySelector(`[data-opens=${name}]`).focus();
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    const draft = byId("draft");
    draft.addEventListener("input", () => this.#fitDraft());
    draft.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-talk").addEventListener("click", () => this.begin());
    byId("mode").addEventListener("change", () => {
      this.#change({ settings: { ...this.conversation.settings, mode: byId("mode").value } });
      this.#showSettings();
      this.#showWelcome();
    });
    byId("system").addEventListener("input", () => this.#change({ system: byId("system").value }));
    for (const opener of document.querySelectorAll("[data-opens]")) opener.addEventListener("click", () => this.toggle(opener.dataset.opens));
    for (const closer of document.querySelectorAll("[data-closes]")) closer.addEventListener("click", () => this.#close(closer.dataset.closes));
    byId("export").addEventListener("click", () => this.#export(this.store.conversations.filter(({ messages }) => messages.length)));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", () => this.#import(byId("import-file")));
    document.querySelector(".talk").addEventListener("click", (event) => {
      if (!WIDE.matches && !event.target.closest("[data-opens]")) ["talks", "settings"].forEach((name) => this.toggle(name, false));
    });
    byId("scroll").addEventListener("scroll", () => (byId("to-end").hidden = this.#isAtEnd()), { passive: true });
    byId("to-end").addEventListener("click", () => this.#scrollToEnd());
    window.addEventListener("pagehide", () => this.running && this.store.save(this.running.conversation));
    window.addEventListener("storage", (event) => {
      const isOwn = this.running && event.key?.endsWith(this.running.conversation.id);
      if (isOwn || this.store.reload(event.key) === null) return;
      const current = this.store.get(this.conversation.id);
      if (current === this.conversation) this.#showList();
      else this.#open(current ?? this.store.conversations[0] ?? this.#fresh());
    });
  }

  #fresh() {
    const conversation = newConversation({ ...this.conversation?.settings });
    this.store.add(conversation);
    return conversation;
  }

  #open(conversation) {
    this.drafts.set(this.conversation.id, byId("draft").value);
    this.conversation = conversation;
    remember("llamita.conversation", conversation.id);
    byId("draft").value = this.drafts.get(conversation.id) ?? "";
    this.#show();
  }

  #change(fields) {
    Object.assign(this.conversation, fields);
    this.store.save(this.conversation);
  }

  #modelChanged() {
    const { layers, heads, parameters, vocab_size: pieces } = this.app.facts;
    const facts = [parameters && `${size(parameters)} parameters`, layers && count(layers, "layer"), heads && `${heads} heads each`, pieces && `${pieces.toLocaleString("en")} tokens known`];
    byId("model-facts").textContent = facts.filter(Boolean).join(" · ");
    this.#showSettings();
    this.#showWelcome();
  }

  /** True where the model is to go on with the text: as chosen, or because it was not trained to chat. */
  get continues() {
    if (this.app.model === null || !this.app.can("completions")) return false;
    if (!this.app.can("chat")) return true;
    return (this.conversation.settings.mode ?? (this.app.facts.chat ? "chat" : "text")) === "text";
  }

  // What is shown ------------------------------------------------------------------------------------------------------

  #show() {
    this.views.clear();
    const messages = this.conversation.messages;
    for (const message of messages) {
      this.views.set(message, new MessageView(message, this.#actions(), { isOpen: message === this.running?.message }));
    }
    byId("messages").replaceChildren(...[...this.views.values()].map(({ element }) => element));
    if (messages.length) this.views.get(messages.at(-1)).setLast(true);
    this.#showList();
    this.#showSettings();
    this.#showWelcome();
    this.#showState();
    this.#fitDraft();
    this.#scrollToEnd();
  }

  #showList() {
    const talks = this.store.conversations.filter((talk) => talk.messages.length || talk === this.conversation);
    talks.sort((a, b) => b.updated - a.updated);
    byId("talk-list").replaceChildren(...talks.map((talk) => this.#listItem(talk)));
    byId("talk-title").textContent = titleOf(this.conversation);
    byId("export").disabled = !talks.some(({ messages }) => messages.length);
  }

  #listItem(talk) {
    const isCurrent = talk === this.conversation;
    const open = h("button", { type: "button", class: "talk-name", dir: "auto", "aria-current": isCurrent ? "true" : null, onclick: () => {
      this.#open(talk);
      this.#close("talks");
    } }, titleOf(talk));
    const item = h("li", { class: isCurrent ? "current" : "" }, open);
    if (talk.messages.length) {
      item.append(h("span", { class: "talk-actions" },
        button("Rename", "edit", () => this.#rename(talk, item), { quiet: true }),
        button("Export", "save", () => this.#export([talk]), { quiet: true }),
        button("Delete", "delete", () => this.#delete(talk), { quiet: true }),
      ));
    }
    return item;
  }

  #showSettings() {
    byId("system").value = this.conversation.system;
    byId("system-field").hidden = this.continues;
    byId("mode-field").hidden = !(this.app.can("chat") && this.app.can("completions"));
    byId("mode").value = this.continues ? "text" : "chat";
    this.sampling.show(this.conversation.settings, this.app.defaults, { reasoning: this.app.can("reasoning") });
  }

  #showWelcome() {
    const welcome = byId("welcome");
    welcome.hidden = this.conversation.messages.length > 0;
    const known = this.app.model !== null;
    const writesNothing = known && !this.app.can("chat") && !this.app.can("completions");
    byId("draft").placeholder = this.continues ? "Write a beginning" : "Write a message";
    byId("draft").disabled = writesNothing;
    byId("composer-help").textContent = this.continues
      ? "Enter sends; with nothing written, the model goes on. Shift+Enter begins a new line."
      : "Enter sends, Shift+Enter begins a new line. Small models often err.";
    let words = ["What shall we talk about?", `You talk with ${this.app.model?.id ?? "the model"}, which runs on this server and nowhere else.`];
    if (this.continues) words = ["How does it begin?", `${this.app.model.id} goes on with the text that you begin${this.app.facts.chat ? "" : "; it was not trained to chat"}.`];
    if (writesNothing) words = ["This model does not write", `${this.app.model.id} sorts texts under labels. Try it under Decisions.`];
    if (!known) words = ["One moment", "The server is being asked for its models."];
    const starters = !known || writesNothing ? [] : this.continues ? BEGINNINGS : STARTERS;
    welcome.replaceChildren(
      h("img", { src: "page/llamita.svg", alt: "", width: 64, height: 64 }),
      h("h3", {}, words[0]),
      h("p", {}, words[1]),
      h("div", { class: "chips" }, starters.map((text) => h("button", { type: "button", class: "chip", onclick: () => this.#send(text) }, text))),
    );
  }

  #showState() {
    const isRunning = this.running !== null;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("messages").setAttribute("aria-busy", isRunning);
  }

  #fitDraft() {
    const draft = byId("draft");
    draft.style.height = "auto";
    draft.style.height = `${Math.min(draft.scrollHeight, 220)}px`;
  }

  #isAtEnd() {
    const scroll = byId("scroll");
    return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END;
  }

  #scrollToEnd() {
    const scroll = byId("scroll");
    scroll.scrollTop = scroll.scrollHeight;
  }

  // What the user does -------------------------------------------------------------------------------------------------

  #actions() {
    return {
      copy: async (message) => this.app.toast((await copyText(message.content)) ? "Copied." : "The browser did not allow to copy."),
      edit: (message, text) => this.#edit(message, text),
      again: (message) => this.#cutAndAnswer(this.conversation.messages.indexOf(message)),
      answerCalls: (message, texts) => {
        message.tool_calls.forEach((call, index) => this.#add({ role: "tool", tool_call_id: call.id, content: texts[index] }));
        this.#answer();
      },
    };
  }

  #send(text = byId("draft").value) {
    if (this.running || this.app.model === null) return;
    if (text.trim() === "") {
      // A text that was begun goes on without another word.
      if (this.continues && this.conversation.messages.length) this.#answer();
      return;
    }
    byId("draft").value = "";
    this.#fitDraft();
    this.#add({ role: "user", content: this.continues ? text : text.trim() });
    this.#answer();
  }

  #edit(message, text) {
    if (message.role === "user" && this.#isBusy()) return;
    message.content = text;
    if (message.role === "user") {
      this.#cutAndAnswer(this.conversation.messages.indexOf(message) + 1);
      return;
    }
    this.store.save(this.conversation);
    this.#show();
  }

  #cutAndAnswer(length) {
    if (this.#isBusy()) return;
    this.conversation.messages.splice(length);
    this.#show();
    this.#answer();
  }

  /** Returns whether an answer is under way, and says so. */
  #isBusy() {
    if (this.running) this.app.toast("Another answer is still being written; stop it first.");
    return this.running !== null;
  }

  #add(message, isOpen = false) {
    const { messages } = this.conversation;
    if (messages.length) this.views.get(messages.at(-1))?.setLast(false);
    messages.push(message);
    this.conversation.updated = Date.now();
    this.store.save(this.conversation);
    const view = new MessageView(message, this.#actions(), { isOpen });
    this.views.set(message, view);
    byId("messages").append(view.element);
    byId("welcome").hidden = true;
    this.#showList();
    this.#scrollToEnd();
  }

  #rename(talk, item) {
    const input = h("input", { type: "text", class: "rename", dir: "auto", "aria-label": "Name of the conversation", maxlength: 120 });
    input.value = titleOf(talk);
    let isOver = false;
    const end = (keep) => {
      if (isOver) return;
      isOver = true;
      if (keep) talk.title = input.value.trim();
      this.store.save(talk);
      this.#showList();
    };
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    item.replaceChildren(input);
    input.select();
  }

  #delete(talk) {
    if (this.running?.conversation === talk) this.stop();
    this.store.delete(talk.id);
    if (talk === this.conversation) this.#open(this.store.conversations[0] ?? this.#fresh());
    else this.#showList();
    this.app.toast(`“${titleOf(talk)}” is deleted.`, () => {
      this.store.add(talk);
      this.store.save(talk);
      this.#open(talk);
    });
  }

  #export(talks) {
    const name = talks.length === 1 ? fileName(titleOf(talks[0])) : "conversations";
    saveFile(`${name}.json`, exported(talks));
  }

  async #import(input) {
    const file = input.files[0];
    input.value = "";
    if (!file) return;
    try {
      if (file.size > LARGEST_IMPORT) throw new Error("This file is larger than 20 MB; it is not read.");
      const talks = imported(await file.text());
      for (const talk of talks.toReversed()) {
        this.store.add(talk);
        this.store.save(talk);
      }
      if (talks.length) this.#open(talks[0]);
      this.app.toast(`${count(talks.length, "conversation")} imported.`);
    } catch (error) {
      this.app.toast(error.message);
    }
  }

  // The answer ---------------------------------------------------------------------------------------------------------

  async #answer() {
    const { conversation, app } = this;
    const continued = this.continues;
    const path = continued ? "v1/completions" : "v1/chat/completions";
    const body = {
      model: app.model.id,
      ...(continued ? { prompt: continuedText(conversation) } : { messages: requestMessages(conversation) }),
      ...(continued && CONTINUED),
      ...requestFields({ ...app.suggested, ...conversation.settings }),
      stream: true,
      stream_options: { include_usage: true },
    };
    const message = { role: "assistant", content: "", model: app.model.id, parameters: effective(conversation.settings, { ...app.defaults, ...(continued && CONTINUED) }) };
    if (continued) message.continued = true;
    this.#add(message, true);
    const controller = new AbortController();
    this.running = { conversation, message, controller };
    this.#showState();
    app.announce("The answer begins.");
    const paint = this.#painter(message);
    const started = performance.now();
    let saved = started;
    try {
      for await (const event of app.api.stream(path, body, controller.signal)) {
        if (takeEvent(message, event) && !message.timings) message.timings = { first_seen_seconds: (performance.now() - started) / 1000 };
        paint();
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          this.store.save(conversation);
        }
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else this.#fail(message, error);
    }
    this.running = null;
    conversation.updated = Date.now();
    if (this.store.get(conversation.id)) this.store.save(conversation); // it may be deleted by now
    const wasAtEnd = this.#isAtEnd();
    const isLast = this.conversation.messages.at(-1) === message;
    this.views.get(message)?.finish({ isLast });
    this.#showState();
    if (wasAtEnd) this.#scrollToEnd();
    app.announce(message.error ?? spoken(message));
  }

  #fail(message, error) {
    message.error = error.message;
    if (error.status === 401) this.app.report(error);
    if (!(error instanceof ApiError)) console.error(error); // a fault of this page
  }

  /** Returns a function that shows what has come of a message, once a frame at most. */
  #painter(message) {
    let isPlanned = false;
    return () => {
      if (isPlanned) return;
      isPlanned = true;
      requestAnimationFrame(() => {
        isPlanned = false;
        const view = this.views.get(message);
        if (!view?.isOpen) return;
        const wasAtEnd = this.#isAtEnd();
        view.grow();
        if (wasAtEnd) this.#scrollToEnd();
        else byId("to-end").hidden = false;
      });
    };
  }
}

/** Adds to a message what an event of the stream carries; returns whether that was a part of the answer. */
function takeEvent(message, event) {
  if (event.usage) message.usage = event.usage;
  if (event.timings) message.timings = { ...message.timings, ...event.timings };
  const choice = event.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) message.finish_reason = choice.finish_reason;
  const delta = choice.delta ?? { content: choice.text };
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const index = Math.min(part.index ?? 0, message.tool_calls.length); // no gaps, whatever comes
    const call = (message.tool_calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (part.id) call.id = part.id;
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  return Boolean(reasoning || delta.content || delta.tool_calls);
}

/** Returns the messages of a conversation as the server takes them; an answer that failed is left out. */
function requestMessages({ system, messages }) {
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content, tool_calls, tool_call_id } of messages) {
    if (role === "assistant" && !content && !tool_calls) continue;
    sent.push({ role, content: content || (tool_calls ? null : ""), ...(tool_calls && { tool_calls }), ...(tool_call_id && { tool_call_id }) });
  }
  return sent;
}

/** Returns all of the text so far, for a model that goes on with it. */
function continuedText({ messages }) {
  return messages.reduce((text, { content }) => {
    const needsSpace = text && content && !/\s$/.test(text) && !/^\s/.test(content) && !/^[.,;:!?]/.test(content);
    return text + (needsSpace ? " " : "") + content;
  }, "");
}

function titleOf({ title, messages }) {
  const first = messages.find(({ role }) => role === "user")?.content.trim().replaceAll(/\s+/g, " ") ?? "";
  return title || (first.length > 60 ? `${[...first].slice(0, 58).join("")}…` : first) || "New conversation";
}

function fileName(title) {
  return title.replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-|-$/g, "").slice(0, 40) || "conversation";
}

/** Returns what is said aloud when an answer is complete. */
function spoken({ content, stopped }) {
  if (stopped) return "Stopped.";
  const words = content.split(/\s+/).filter(Boolean).length;
  return words <= 60 ? content : `The answer is complete: ${count(words, "word")}.`;
}
