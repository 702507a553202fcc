// Server-sent events out of bytes that arrive in any pieces (WHATWG HTML, section 9.2.6).

/** Takes bytes by `feed` and returns the data of each event that they complete. Comments and other fields are passed over. */
export class EventParser {
  #decoder = new TextDecoder(); // keeps a character whose bytes arrive in two pieces
  #pieces = []; // of the line that is not yet complete
  #data = []; // the data lines of the event that is not yet complete
  #afterReturn = false; // a line feed here belongs to the carriage return before it

  feed(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text && this.#afterReturn) {
      if (text[0] === "\n") text = text.slice(1);
      this.#afterReturn = false;
    }
    const events = [];
    let start = 0;
    for (const end of text.matchAll(/\r\n|\n|\r/g)) {
      this.#pieces.push(text.slice(start, end.index));
      this.#line(this.#pieces.join(""), events);
      this.#pieces = [];
      start = end.index + end[0].length;
    }
    this.#afterReturn = text.endsWith("\r");
    if (start < text.length) this.#pieces.push(text.slice(start));
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data") {
      this.#data.push("");
    } else if (line.startsWith("data:")) {
      this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}
