// Building and finding elements. Text given here is always shown as text; no HTML is ever parsed.

/**
 * Returns a new element.
 *
 * An attribute whose name begins with "on" is a listener; null, undefined and false leave an attribute out, true sets it
 * empty. Children are nodes or strings; null and false are left out.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Returns the element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Returns one of the drawings that index.html defines, as decoration of a text or label beside it. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Returns a button with an icon; `label` is its text, or its spoken name where `quiet`. */
export function button(label, iconName, onclick, { quiet = false, kind = "" } = {}) {
  const words = quiet ? {} : h("span", {}, label);
  const attributes = { type: "button", class: `button ${kind} ${quiet ? "quiet" : ""}`.trim(), onclick };
  if (quiet) Object.assign(attributes, { "aria-label": label, title: label });
  return h("button", attributes, iconName && icon(iconName), quiet ? null : words);
}

/** Copies a text to the clipboard. Returns whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text); // absent where the page came over plain http from another machine
    return true;
  } catch {
    const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Offers a text as a file to save. */
export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Returns a colour of the style sheet, a custom property such as "--heat", as [red, green, blue] from 0 to 255. */
export function colour(property) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${property})`;
  document.body.append(probe);
  const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return parts;
}
