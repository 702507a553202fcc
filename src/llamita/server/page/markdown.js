// Markdown to elements, while it is being written. Text is only ever put into text nodes, so nothing in it can run.
//
// Paragraphs, headings, lists, quotes, rules, fenced code, tables; emphasis, code, strikethrough, links to http and https.
// Everything else, HTML and images included, is shown as it was written. The work is linear in the length of the text: a
// finished line is never looked at again, and a paragraph is rendered again only within its last segment.

import { inline } from "./inline.js";

const LINE = 4096; // characters of a line that decide what it is; what follows them is a part of the same block
const SEGMENT = 2048; // characters of a paragraph that are rendered together
const DEPTH = 12; // of lists and quotes in one another
const COLUMNS = 40; // of a table

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
// A line that is not complete and that may still turn into something else than text: it waits for its end.
const UNDECIDED = /^(#{1,6}|>|([-*+_] ?)+|\d{1,9}[.)]?|`{1,2}|`{3,}[^`]*|~{1,2}|~{3,}.*|[|:\s-]*)$/;

const LETTER = /\p{L}/u;
const FROM_THE_RIGHT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}\p{Script=Adlam}]/u;
const CONTAINERS = new Set(["LI", "UL", "OL", "BLOCKQUOTE"]);

/** Shows a text that grows: `append` takes its next piece, `finish` ends it. Any division into pieces ends alike. */
export class Markdown {
  #root;
  #blocks;
  #rest = ""; // the line that is not complete
  #begun = false; // where that line was so long that its beginning is settled
  #saved = null; // what to go back to before the incomplete line is shown anew

  constructor(root) {
    this.#root = root;
    this.#blocks = new Blocks(root, 0);
  }

  append(text) {
    this.#goBack();
    const lines = text.split("\n");
    lines[0] = this.#rest + lines[0];
    this.#rest = lines.pop();
    for (const line of lines) {
      this.#take(line.endsWith("\r") ? line.slice(0, -1) : line);
      this.#begun = false;
    }
    if (this.#begun || this.#rest.length > LINE) {
      this.#take(this.#rest);
      this.#begun = true;
      this.#rest = "";
    }
    this.#blocks.render();
    if (this.#rest && !UNDECIDED.test(this.#rest.trim().slice(0, 200))) {
      this.#saved = this.#blocks.save();
      this.#blocks.line(this.#rest);
      this.#blocks.render();
    }
  }

  finish() {
    this.#goBack();
    if (this.#rest) this.#take(this.#rest);
    this.#rest = "";
    this.#blocks.close();
    this.#root.normalize();
  }

  #goBack() {
    if (this.#saved) this.#blocks.restore(this.#saved);
    this.#saved = null;
  }

  /** Takes a line, or the next part of one that is begun. */
  #take(line) {
    const end = this.#begun ? 0 : boundary(line, LINE);
    if (!this.#begun) this.#blocks.line(line.slice(0, end));
    if (line.length > end) this.#blocks.more(line.slice(end));
  }
}

/** Returns an element with all of a text. */
export function rendered(text) {
  const root = document.createElement("div");
  const markdown = new Markdown(root);
  markdown.append(text);
  markdown.finish();
  return root;
}

/*
 * Each kind of block has the same verbs. `line` takes a line and returns whether it belongs here; `more` takes what follows
 * on the same line; `render` shows what was taken; `close` ends the block; `save` and `restore` go back to an earlier state.
 * Only the last block of a sequence is ever open.
 */

/** A sequence of blocks: the whole text, an item of a list, a quote. */
class Blocks {
  constructor(element, depth) {
    this.element = element;
    this.depth = depth;
    this.open = null;
  }

  line(line) {
    if (this.open?.line(line)) return true;
    if (line.trim() === "") this.close();
    else if (!this.#start(line)) this.#paragraph().add(line);
    return true;
  }

  more(text) {
    if (this.open?.more) this.open.more(text);
    else this.#paragraph().more(text);
  }

  /** True where a line that is not indented goes on in a paragraph that is open further inside. */
  continues(line) {
    if (this.open instanceof Paragraph) return !startsBlock(line);
    return this.open?.blocks?.continues(line) ?? false;
  }

  render() {
    this.open?.render();
  }

  close() {
    this.open?.close();
    this.open = null;
  }

  save() {
    const last = this.element.lastChild;
    return { last, before: last?.previousSibling ?? null, open: this.open, inside: this.open?.save() };
  }

  restore(saved) {
    if (saved.last && saved.last.parentNode !== this.element) {
      shorten(this.element, saved.before); // a table took the place of its header's paragraph
      this.element.append(saved.last);
    }
    shorten(this.element, saved.last);
    this.open = saved.open;
    this.open?.restore(saved.inside);
  }

  /** Begins the block that a line begins, if it begins any but a paragraph. Returns whether it did. */
  #start(line) {
    const fence = FENCE.exec(line);
    if (fence) return this.#begin(new Code(this.element, fence[1], fence[2].trim()));
    const heading = HEADING.exec(line);
    if (heading) {
      this.close();
      // The page has the first two levels itself.
      const element = this.#child(`h${Math.min(6, heading[1].length + 2)}`);
      inline(withoutClosingMarks(line.slice(heading[0].length)), element);
      direct(element, line);
      return true;
    }
    if (isRule(line)) {
      this.close();
      this.element.append(document.createElement("hr"));
      return true;
    }
    if (this.depth < DEPTH) {
      if (QUOTE.test(line)) return this.#begin(new Quote(this.#child("blockquote"), this.depth), line);
      const item = ITEM.exec(line);
      // Within a paragraph, only a bullet or a one begins a list: "1984. That was the year" may be the paragraph's own.
      const begins = !(this.open instanceof Paragraph) || (item?.[3] && /^(\D|1\D)/.test(item[2]));
      if (item && begins) return this.#begin(new List(this.element, item, this.depth), line);
    }
    return this.#startTable(line);
  }

  #startTable(line) {
    const header = this.open instanceof Paragraph ? this.open.onlyLine : null;
    if (!header?.includes("|") || !/^[|:\s-]+$/.test(line)) return false;
    const [titles, sides] = [cells(header), cells(line)];
    if (titles.length !== sides.length || titles.length > COLUMNS) return false;
    if (!sides.every((cell) => /^:?-+:?$/.test(cell))) return false;
    this.open.element.remove();
    this.open = null;
    return this.#begin(new Table(this.element, titles, sides));
  }

  #paragraph() {
    if (!(this.open instanceof Paragraph)) this.#begin(new Paragraph(this.#child("p")));
    return this.open;
  }

  #begin(block, line = null) {
    this.close();
    this.open = block;
    if (line !== null) block.line(line);
    return true;
  }

  #child(tag) {
    const element = document.createElement(tag);
    this.element.append(element);
    return element;
  }
}

class Paragraph {
  constructor(element) {
    this.element = element;
    this.text = ""; // of the last segment
    this.lines = 0;
    this.settled = null; // the last node that is never rendered again
  }

  line() {
    return false; // the sequence decides whether a line begins something else
  }

  add(line) {
    this.more((this.lines ? "\n" : "") + line.trimStart());
    this.lines += 1;
  }

  more(text) {
    this.text += text;
    direct(this.element, this.text);
    while (this.text.length > SEGMENT) {
      const space = Math.max(this.text.lastIndexOf(" ", SEGMENT), this.text.lastIndexOf("\n", SEGMENT));
      const end = space > 0 ? space + 1 : boundary(this.text, SEGMENT);
      const rest = this.text.slice(end);
      this.text = this.text.slice(0, end);
      this.render();
      this.settled = this.element.lastChild;
      this.text = rest;
    }
  }

  /** The text where it is one short line, which may be the header of a table. */
  get onlyLine() {
    return this.lines === 1 && !this.settled ? this.text : null;
  }

  render() {
    shorten(this.element, this.settled);
    inline(this.text, this.element);
  }

  close() {
    this.text = this.text.trimEnd();
    this.render();
  }

  save() {
    return { text: this.text, lines: this.lines, settled: this.settled };
  }

  restore(saved) {
    Object.assign(this, saved);
    this.render();
  }
}

class Code {
  constructor(parent, fence, language) {
    this.fence = fence;
    this.ended = false;
    this.isEmpty = true;
    this.code = document.createElement("code");
    const pre = document.createElement("pre");
    pre.dir = "ltr";
    pre.tabIndex = 0; // wide code can be scrolled by keys
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", language ? `Code, ${language.slice(0, 40)}` : "Code");
    pre.append(this.code);
    const name = document.createElement("span");
    name.textContent = language.slice(0, 40) || "code";
    const copy = document.createElement("button");
    copy.type = "button";
    copy.className = "button small";
    copy.dataset.copy = "code"; // the page listens for it
    copy.textContent = "Copy";
    const header = document.createElement("div");
    header.className = "code-header";
    header.append(name, copy);
    const box = document.createElement("div");
    box.className = "code";
    box.append(header, pre);
    parent.append(box);
  }

  line(line) {
    if (this.ended) return false;
    const end = FENCE.exec(line);
    if (end && end[2].trim() === "" && end[1].startsWith(this.fence)) {
      this.ended = true;
    } else {
      this.code.append(this.isEmpty ? line : `\n${line}`);
      this.isEmpty = false;
    }
    return true;
  }

  more(text) {
    this.code.append(text);
  }

  render() {}

  close() {}

  save() {
    return { last: this.code.lastChild, ended: this.ended, isEmpty: this.isEmpty };
  }

  restore(saved) {
    shorten(this.code, saved.last);
    this.ended = saved.ended;
    this.isEmpty = saved.isEmpty;
  }
}

/** A block that holds others, which take what comes within it. */
class Holder {
  more(text) {
    this.blocks.more(text);
  }

  render() {
    this.blocks.render();
  }

  close() {
    this.blocks.close();
  }
}

class Quote extends Holder {
  constructor(element, depth) {
    super();
    this.blocks = new Blocks(element, depth + 1);
  }

  line(line) {
    if (QUOTE.test(line)) return this.blocks.line(line.replace(QUOTE, ""));
    return line.trim() !== "" && this.blocks.continues(line) && this.blocks.line(line);
  }

  save() {
    return this.blocks.save();
  }

  restore(saved) {
    this.blocks.restore(saved);
  }
}

class List extends Holder {
  constructor(parent, item, depth) {
    super();
    const number = parseInt(item[2], 10);
    this.element = document.createElement(Number.isNaN(number) ? "ul" : "ol");
    if (number >= 0 && number !== 1) this.element.start = number;
    parent.append(this.element);
    this.kind = item[2].slice(-1); // another bullet begins another list
    this.depth = depth;
    this.blocks = null; // of the last item
    this.indent = 0; // columns before the text of the last item
    this.wasBlank = false;
  }

  line(line) {
    if (line.trim() === "") {
      this.wasBlank = true;
      return this.blocks.line("");
    }
    const even = line.replace(/^[ \t]+/, (start) => start.replaceAll("\t", "    "));
    const spaces = even.length - even.trimStart().length;
    const item = isRule(even) ? null : ITEM.exec(even);
    const isSibling = item?.[2].endsWith(this.kind);
    if (this.blocks && (spaces >= this.indent || (item && !isSibling && spaces >= 2))) {
      this.wasBlank = false;
      return this.blocks.line(even.slice(Math.min(spaces, this.indent)));
    }
    if (isSibling) return this.#item(item, even);
    return !this.wasBlank && this.blocks.continues(even) && this.blocks.line(even.trimStart());
  }

  #item(item, line) {
    this.blocks?.close();
    const element = document.createElement("li");
    this.element.append(element);
    this.blocks = new Blocks(element, this.depth + 1);
    const spaces = item[3].length >= 1 && item[3].length <= 4 && item[0].length < line.length ? item[3].length : 1;
    this.indent = item[1].length + item[2].length + spaces;
    this.wasBlank = false;
    const text = line.slice(item[0].length);
    return text === "" || this.blocks.line(text);
  }

  save() {
    const { blocks, indent, wasBlank } = this;
    return { last: this.element.lastChild, fields: { blocks, indent, wasBlank }, inside: blocks.save() };
  }

  restore(saved) {
    shorten(this.element, saved.last);
    Object.assign(this, saved.fields);
    this.blocks.restore(saved.inside);
  }
}

class Table {
  constructor(parent, titles, delimiters) {
    this.sides = delimiters.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start"));
    this.body = document.createElement("tbody");
    const head = document.createElement("thead");
    head.append(this.#row(titles, "th"));
    const table = document.createElement("table");
    table.append(head, this.body);
    const box = document.createElement("div");
    box.className = "table";
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Table");
    box.append(table);
    parent.append(box);
  }

  line(line) {
    if (!line.includes("|")) return false;
    this.body.append(this.#row(cells(line), "td"));
    return true;
  }

  more(text) {
    this.body.lastChild?.lastChild.append(text);
  }

  #row(texts, tag) {
    const row = document.createElement("tr");
    for (let column = 0; column < Math.max(texts.length, this.sides.length); column += 1) {
      const cell = document.createElement(tag);
      cell.className = this.sides[column] ?? "start";
      inline(texts[column] ?? "", cell);
      direct(cell, texts[column] ?? "");
      row.append(cell);
    }
    return row;
  }

  render() {}

  close() {}

  save() {
    return this.body.lastChild;
  }

  restore(last) {
    shorten(this.body, last);
  }
}

function startsBlock(line) {
  return [FENCE, HEADING, QUOTE, ITEM].some((form) => form.test(line)) || isRule(line);
}

function isRule(line) {
  return /^ {0,3}[-*_]/.test(line) && /^(-{3,}|\*{3,}|_{3,})$/.test(line.replaceAll(/\s/g, ""));
}

/** Returns the text of a heading without the number signs that may follow it. */
function withoutClosingMarks(text) {
  const trimmed = text.trim();
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(trimmed[end - 1]) ? trimmed.slice(0, end).trimEnd() : trimmed;
}

/** Returns the cells of a row; a bar behind a backslash is a part of its cell. */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/**
 * Gives an element the direction of the first letter of a text, once there is one; what it begins, lists and quotes, goes
 * the same way. (dir="auto" would do so too, but browsers then look at all children whenever one changes.)
 */
function direct(element, text) {
  if (element.dir) return;
  const letter = LETTER.exec(text);
  if (!letter) return;
  const direction = FROM_THE_RIGHT.test(letter[0]) ? "rtl" : "ltr";
  for (let block = element; block && !block.dir && (block === element || CONTAINERS.has(block.tagName)); block = block.parentElement) {
    block.dir = direction;
  }
}

/** Removes what follows the child `last`; all, where that is null. (Counting children would be linear in them.) */
function shorten(element, last) {
  while (element.lastChild !== last) element.lastChild.remove();
}

/** Returns the largest place up to `most` at which a text can be cut without parting the halves of a character. */
function boundary(text, most) {
  if (text.length <= most) return text.length;
  return /[\ud800-\udbff]/.test(text[most - 1]) ? most - 1 : most;
}
