// Small choices that outlive the page: the theme, the model, the conversation. Without storage they are forgotten.

/** Keeps a text under a name in this browser; null removes it. */
export function remember(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // Storage is full or switched off; the choice holds until the page closes.
  }
}

/** Returns what is kept under a name, or null. */
export function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Keeps a text until this tab closes, where one is given, and returns what is kept ("" for nothing). */
export function session(name, value = undefined) {
  try {
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return value ?? "";
  }
}
