// Markdown within a line: emphasis, code, strikethrough, links. Appends nodes; text is only ever put into text nodes.

const LONGEST_LINK = 2048;
const OPEN = 24; // emphases in one another
const ADDRESS = /https?:\/\/[^\s<>"`\\]+/giy;
const MARKS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

/** Appends `text` to `parent`, its marks turned into elements. Linear in the length of the text, nearly always. */
export function inline(text, parent) {
  const parts = []; // elements and {text}, which may yet open something: {text, mark, size} or {text, bracket}
  const openers = []; // indices of such parts
  const missing = new Set(); // lengths of backtick runs that nothing closes
  let plain = "";
  const flush = () => {
    if (plain) parts.push({ text: plain });
    plain = "";
  };
  const wrap = (start, element) => {
    element.append(...joined(parts.splice(start).slice(1)));
    while (openers.length && openers.at(-1) >= start) openers.pop();
    parts.push(element);
  };

  let at = 0;
  while (at < text.length) {
    const character = text[at];
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (character === "`") {
      const run = runLength(text, at);
      const end = missing.has(run) ? -1 : closingRun(text, at + run, run);
      if (end < 0) {
        missing.add(run);
        plain += text.slice(at, at + run);
        at += run;
      } else {
        flush();
        const code = document.createElement("code");
        code.textContent = text.slice(at + run, end).replaceAll("\n", " ").replace(/^ (.*[^ ].*) $/, "$1");
        code.dir = "auto";
        parts.push(code);
        at = end + run;
      }
    } else if (character in MARKS) {
      const run = runLength(text, at);
      flush();
      marks(text, at, run, parts, openers, wrap);
      at += run;
    } else if (character === "!" && text[at + 1] === "[") {
      plain += "!["; // no images: shown as written
      at += 2;
    } else if (character === "[") {
      flush();
      if (openers.length < OPEN) openers.push(parts.length);
      parts.push({ text: "[", bracket: true });
      at += 1;
    } else if (character === "]") {
      const opener = openers.findLast((index) => parts[index].bracket);
      const target = opener === undefined ? null : linkTarget(text, at + 1);
      const link = target && httpLink(target.address);
      if (link) {
        flush();
        wrap(opener, link);
        at = target.end;
      } else {
        if (opener !== undefined) openers.splice(openers.indexOf(opener), 1); // it stays a bracket
        plain += "]";
        at += 1;
      }
    } else if (character === "<" && /^<https?:\/\/[^\s<>]{1,2000}>/i.test(text.slice(at, at + LONGEST_LINK))) {
      const end = text.indexOf(">", at);
      const link = httpLink(text.slice(at + 1, end));
      flush();
      parts.push(link ? labelled(link, text.slice(at + 1, end)) : { text: text.slice(at, end + 1) });
      at = end + 1;
    } else if ((character === "h" || character === "H") && !/\w/.test(text[at - 1] ?? " ")) {
      ADDRESS.lastIndex = at;
      let address = ADDRESS.exec(text)?.[0].replace(/[.,:;!?'*_~\]}]+$/, "") ?? "";
      if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
      const link = address && !insideLink(parts, openers) && httpLink(address);
      if (link) {
        flush();
        parts.push(labelled(link, address));
        at += address.length;
      } else {
        plain += character;
        at += 1;
      }
    } else {
      plain += character;
      at += 1;
    }
  }
  flush();
  parent.append(...joined(parts));
}

/** Takes a run of `*`, `_` or `~`: closes what it can close, then opens. */
function marks(text, at, run, parts, openers, wrap) {
  const mark = text[at];
  const [before, after] = [characterBefore(text, at), characterAfter(text, at + run)];
  const opensLeft = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
  const closesRight = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
  const canOpen = opensLeft && (mark !== "_" || !closesRight || isPunctuation(before));
  const canClose = closesRight && (mark !== "_" || !opensLeft || isPunctuation(after));
  let left = run;
  while (canClose && left) {
    const opener = openers.findLast((index) => parts[index].mark === mark && parts[index].size <= left);
    if (opener === undefined) break;
    const size = parts[opener].size;
    wrap(opener, document.createElement(MARKS[mark][size - 1]));
    left -= size;
  }
  while (left) {
    const size = left % 2 ? 1 : 2; // of three, the single one is outside
    if (canOpen && openers.length < OPEN && MARKS[mark][size - 1]) openers.push(parts.length);
    parts.push({ text: mark.repeat(size), mark, size });
    left -= size;
  }
}

/** Returns the nodes of parts, texts side by side as one. */
function joined(parts) {
  const nodes = [];
  let text = "";
  for (const part of parts) {
    if (!(part instanceof Node)) {
      text += part.text;
      continue;
    }
    if (text) nodes.push(document.createTextNode(text));
    text = "";
    nodes.push(part);
  }
  if (text) nodes.push(document.createTextNode(text));
  return nodes;
}

/** Returns the address in `(address "title")` at `at` and where that ends, or null. */
function linkTarget(text, at) {
  if (text[at] !== "(") return null;
  const match = /^\(\s*(?:<([^<>\n]*)>|([^\s<>]*?))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(text.slice(at, at + LONGEST_LINK));
  if (!match) return null;
  let address = match[1] ?? match[2];
  let end = at + match[0].length;
  // The address may hold one pair of brackets, as those of Wikipedia do.
  if (match[1] === undefined && address.includes("(") && text[end] === ")" && match[0].endsWith(`${address})`)) {
    address += ")";
    end += 1;
  }
  return { address, end };
}

/** Returns a link that gives the other side nothing, or null where the address is not one of http or https. */
function httpLink(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if ((url.protocol !== "http:" && url.protocol !== "https:") || !/^https?:\/\//i.test(address)) return null;
  const link = document.createElement("a");
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  link.title = url.href; // the text of a link may claim another address
  return link;
}

function labelled(link, text) {
  link.textContent = text;
  return link;
}

function insideLink(parts, openers) {
  return openers.some((index) => parts[index].bracket);
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function closingRun(text, from, run) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const length = runLength(text, at);
    if (length === run) return at;
    at += length;
  }
  return -1;
}

function characterBefore(text, at) {
  const low = text.charCodeAt(at - 1);
  return low >= 0xdc00 && low <= 0xdfff && at >= 2 ? text.slice(at - 2, at) : (text[at - 1] ?? " ");
}

function characterAfter(text, at) {
  return at < text.length ? String.fromCodePoint(text.codePointAt(at)) : " ";
}

function isSpace(character) {
  return /\s/u.test(character);
}

function isPunctuation(character) {
  return /[\p{P}\p{S}]/u.test(character);
}
