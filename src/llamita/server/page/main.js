// Starts the page: tabs, theme, the choice of a model, the API key, help. The tabs' own work is in their modules.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { Decisions } from "./decisions.js";
import { byId, copyText, h, icon } from "./dom.js";
import { Inside } from "./inside.js";
import { remember, remembered, session } from "./memory.js";
import { SUGGESTED, isPlain } from "./sampling.js";
import { Store } from "./store.js";

const TABS = ["chat", "inside", "decisions"];
const THEMES = ["system", "light", "dark"];

/** What the tabs share: the server, its models, and ways to tell the user something. */
class App {
  constructor() {
    this.key = session("llamita.key");
    this.api = new Api(() => this.key);
    this.models = [];
    this.listeners = [];
    this.lastStorageProblem = null;
  }

  /** The chosen entry of /v1/models, or null before they are known. */
  get model() {
    return this.models.find(({ id }) => id === byId("model").value) ?? null;
  }

  /** True where the chosen model, or for an adapter the one below it, has a capability. */
  can(capability) {
    const base = this.models.find(({ id }) => id === this.model?.parent);
    const known = this.model?.meta?.capabilities ?? base?.meta?.capabilities ?? [];
    return known.includes(capability);
  }

  /** Facts about the chosen model; an adapter has those of the model below it. */
  get facts() {
    const base = this.models.find(({ id }) => id === this.model?.parent);
    return { ...base?.meta, ...this.model?.meta };
  }

  /** What the page itself chooses for a model that was trained to chat and says nothing of how to draw from it. */
  get suggested() {
    return this.facts.chat && isPlain(this.facts.defaults ?? {}) ? SUGGESTED : {};
  }

  get defaults() {
    return { ...this.facts.defaults, ...this.suggested };
  }

  /** Calls `listener` whenever another model is chosen. */
  onModel(listener) {
    this.listeners.push(listener);
  }

  choose(id) {
    if (!this.models.some((model) => model.id === id) || byId("model").value === id) return;
    byId("model").value = id;
    this.modelChanged();
  }

  modelChanged() {
    remember("llamita.model", byId("model").value);
    this.listeners.forEach((listener) => listener());
  }

  async loadModels() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.models = [];
      this.report(error);
      if (error.status !== 401) setTimeout(() => this.loadModels(), 5000);
      return;
    }
    this.report(null);
    byId("key-form").hidden = true;
    fillModels(byId("model"), this.models);
    const wanted = remembered("llamita.model");
    if (this.models.some(({ id }) => id === wanted)) byId("model").value = wanted;
    this.modelChanged();
  }

  /** Says what went wrong in the line below the header (null: nothing any more); asks for a key where that helps. */
  report(error) {
    const line = byId("problem");
    if (error?.status === 401) {
      byId("key-form").hidden = false;
      byId("key").focus();
    }
    const message = error instanceof Error ? error.message : error;
    line.hidden = !message;
    line.textContent = message ?? "";
  }

  /** Says that conversations are not kept (null: that they are again). */
  storageProblem(problem) {
    if (problem === this.lastStorageProblem) return;
    this.lastStorageProblem = problem;
    this.report(problem);
  }

  /** Says something to users of screen readers. */
  announce(text) {
    byId("announcer").textContent = text;
  }

  /** Shows a sentence for some seconds, with a way to take back what it tells of. */
  toast(text, undo = null) {
    clearTimeout(this.toastTimer);
    const line = byId("toast");
    const hide = () => (line.hidden = true);
    const back = undo && h("button", { type: "button", class: "button", onclick: () => (hide(), undo()) }, "Undo");
    line.replaceChildren(h("span", { dir: "auto" }, text), ...(back ? [back] : []));
    line.hidden = false;
    this.toastTimer = setTimeout(hide, undo ? 10_000 : 4000);
  }
}

function start() {
  const app = new App();
  const store = new Store(storage(), (problem) => app.storageProblem(problem));
  const chat = new Chat(app, store);
  const tabs = { chat, inside: new Inside(app), decisions: new Decisions(app) };
  setUpTabs(tabs);
  setUpTheme();
  setUpKey(app);
  setUpHelp(tabs);
  byId("model").addEventListener("change", () => app.modelChanged());
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy=code]");
    if (!button) return;
    const copied = await copyText(button.closest(".code").querySelector("code").textContent);
    button.textContent = copied ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  app.loadModels();
}

/** Returns the browser's storage, or null where it is switched off. */
function storage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

function fillModels(select, models) {
  const bases = models.filter(({ parent }) => !parent);
  const options = bases.flatMap((base) => [
    h("option", { value: base.id }, base.id),
    ...models.filter(({ parent }) => parent === base.id).map(({ id }) => h("option", { value: id }, `${id} (adapter)`)),
  ]);
  const orphans = models.filter(({ parent }) => parent && !bases.some(({ id }) => id === parent));
  select.replaceChildren(...options, ...orphans.map(({ id }) => h("option", { value: id }, id)));
}

function setUpTabs(tabs) {
  const show = (name, focus = false) => {
    for (const tab of TABS) {
      const chosen = tab === name;
      const button = byId(`tab-${tab}`);
      button.setAttribute("aria-selected", chosen);
      button.tabIndex = chosen ? 0 : -1;
      if (chosen && focus) button.focus();
      byId(`panel-${tab}`).hidden = !chosen;
    }
    history.replaceState(null, "", `#${name}`);
    tabs[name].shown();
  };
  for (const tab of TABS) byId(`tab-${tab}`).addEventListener("click", () => show(tab));
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const current = TABS.findIndex((tab) => byId(`tab-${tab}`).getAttribute("aria-selected") === "true");
    const targets = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: -1 };
    if (!(event.key in targets)) return;
    event.preventDefault();
    show(TABS.at(targets[event.key] % TABS.length), true);
  });
  const wanted = location.hash.slice(1);
  show(TABS.includes(wanted) ? wanted : "chat");
  window.addEventListener("hashchange", () => TABS.includes(location.hash.slice(1)) && show(location.hash.slice(1)));
}

function setUpTheme() {
  const button = byId("theme");
  const icons = { system: "half", light: "sun", dark: "moon" };
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const label = { system: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" }[theme];
    button.setAttribute("aria-label", label);
    button.title = label;
    button.replaceChildren(icon(icons[theme]));
    document.dispatchEvent(new Event("themechange"));
  };
  let theme = document.documentElement.dataset.theme ?? "system";
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    remember("llamita.theme", theme === "system" ? null : theme);
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.dispatchEvent(new Event("themechange")));
}

function setUpKey(app) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    app.key = byId("key").value.trim();
    session("llamita.key", app.key);
    byId("key").value = "";
    app.loadModels();
  });
}

function setUpHelp(tabs) {
  const { chat } = tabs;
  const dialog = byId("help-dialog");
  byId("help").addEventListener("click", () => dialog.showModal());
  byId("help-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || dialog.open) return;
    if (event.key === "Escape") {
      const tab = TABS.find((name) => !byId(`panel-${name}`).hidden);
      if (tabs[tab].escape()) event.preventDefault();
      return;
    }
    if (byId("panel-chat").hidden) return;
    // By place on the keyboard, since Alt changes what a key writes on a Mac.
    const actions = { KeyN: () => chat.begin(), KeyM: () => byId("draft").focus(), KeyS: () => chat.toggle("settings") };
    if (event.altKey && !event.ctrlKey && !event.metaKey && event.code in actions) {
      event.preventDefault();
      actions[event.code]();
    }
  });
}

start();
