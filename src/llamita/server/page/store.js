// Conversations, kept in this browser's storage: one entry for each, so that a long one does not rewrite the others.

const PREFIX = "llamita.conversation.";
const FORMAT = "llamita-conversations";
const VERSION = 1;
const ROLES = ["user", "assistant", "tool"];
export const LARGEST_IMPORT = 20e6; // bytes

/**
 * One conversation:
 * {id, title, created, updated, system, settings, messages: [{role, content, reasoning?, tool_calls?, tool_call_id?, model?,
 *  parameters?, usage?, timings?, finish_reason?, error?, stopped?, continued?}]}; times are milliseconds since 1970, timings
 * seconds. `continued` marks the text of a model that does not chat, which goes on from all of the text before it.
 */
export function newConversation(settings = {}) {
  const now = Date.now();
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", created: now, updated: now, system: "", settings, messages: [] };
}

export class Store {
  /** `onProblem` is told in a sentence when something cannot be kept, and null when it can again. */
  constructor(storage, onProblem) {
    this.storage = storage;
    this.onProblem = onProblem;
    this.conversations = this.#read();
  }

  get(id) {
    return this.conversations.find((conversation) => conversation.id === id);
  }

  add(conversation) {
    this.conversations.unshift(conversation);
  }

  /** Keeps a conversation; one without messages and system prompt is not worth an entry. */
  save(conversation) {
    if (!conversation.messages.length && !conversation.system) return;
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      this.onProblem(null);
    } catch (error) {
      this.onProblem(
        error.name === "QuotaExceededError"
          ? "This browser's storage is full: what is written now is lost when the page closes. Export conversations, then delete some."
          : "This browser keeps nothing for this page: export conversations before you close it.",
      );
    }
  }

  delete(id) {
    this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
    try {
      this.storage.removeItem(PREFIX + id);
    } catch {
      // Where nothing can be stored, there is nothing to remove.
    }
  }

  /** Takes up what another tab has written or deleted under a key. Returns the id of that conversation, or null. */
  reload(key) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    this.conversations = this.conversations.filter((conversation) => conversation.id !== id);
    try {
      this.conversations.push(checked(JSON.parse(this.storage.getItem(key))));
    } catch {
      // It is deleted, or no conversation.
    }
    return id;
  }

  #read() {
    const found = [];
    try {
      for (let index = 0; index < this.storage.length; index += 1) {
        const key = this.storage.key(index);
        if (!key.startsWith(PREFIX)) continue;
        try {
          found.push(checked(JSON.parse(this.storage.getItem(key))));
        } catch {
          // Somebody changed this entry by hand: it is left where it is, and not shown.
        }
      }
    } catch {
      this.onProblem("This browser keeps nothing for this page: export conversations before you close it.");
    }
    return found.sort((a, b) => b.updated - a.updated);
  }
}

/** Returns the text of a file that holds conversations whole: messages, parameters, timings. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, exported: new Date().toISOString(), conversations }, null, 2);
}

/** Returns the conversations of such a file, under new ids. Throws an Error that says in a sentence what is wrong. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON; choose one that was exported here.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error(`This file holds no conversations of this page: its "format" must be "${FORMAT}".`);
  }
  if (file.version !== VERSION) throw new Error(`This file has version ${file.version}; this page reads version ${VERSION}.`);
  return file.conversations.map((value, index) => {
    try {
      return { ...checked(value), id: newConversation().id };
    } catch (error) {
      throw new Error(`Conversation ${index + 1} of the file is damaged: ${error.message}.`);
    }
  });
}

/** Returns a conversation with the known fields of `value`, each of its right type; throws where one is not. */
function checked(value) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error("it is no object");
  const messages = field(value, "messages", Array.isArray, []);
  return {
    id: field(value, "id", isText, ""),
    title: field(value, "title", isText, ""),
    created: field(value, "created", Number.isFinite, 0),
    updated: field(value, "updated", Number.isFinite, 0),
    system: field(value, "system", isText, ""),
    settings: field(value, "settings", isObject, {}),
    messages: messages.map(checkedMessage),
  };
}

function checkedMessage(value) {
  if (!isObject(value)) throw new Error("a message is no object");
  const message = { role: field(value, "role", (role) => ROLES.includes(role)), content: field(value, "content", isText, "") };
  const optional = {
    reasoning: isText,
    tool_call_id: isText,
    model: isText,
    finish_reason: isText,
    error: isText,
    stopped: isFlag,
    continued: isFlag,
    parameters: isObject,
    usage: isObject,
    timings: isObject,
    tool_calls: (calls) => Array.isArray(calls) && calls.every(isToolCall),
  };
  for (const [name, test] of Object.entries(optional)) {
    if (value[name] !== undefined && value[name] !== null) message[name] = field(value, name, test);
  }
  return message;
}

function field(value, name, test, missing) {
  const found = value[name] ?? missing;
  if (!test(found)) throw new Error(`"${name}" is ${JSON.stringify(found)?.slice(0, 40)}`);
  return found;
}

function isText(value) {
  return typeof value === "string";
}

function isFlag(value) {
  return typeof value === "boolean";
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isToolCall(call) {
  return isObject(call) && isText(call.id) && isText(call.function?.name) && isText(call.function?.arguments);
}
