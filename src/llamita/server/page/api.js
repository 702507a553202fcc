// The server's HTTP interface: one method for each thing that the page asks of it.

import { EventParser } from "./sse.js";

/** What the server refused, in its own words; `status` is 0 where no answer came at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, type = "", param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, type, param, code });
  }
}

export class Api {
  /** `key` returns the API key to send, or an empty string. Addresses are relative to the page's own. */
  constructor(key) {
    this.key = key;
  }

  /** Returns the entries of GET /v1/models. */
  async models(signal) {
    const answer = await this.#json("v1/models", { signal });
    return answer.data;
  }

  /** Returns the tokens, predictions, attention maps and layers' predictions for a prompt. */
  lookInside(body, signal) {
    return this.#json("v1/look_inside", { body, signal });
  }

  /** Returns the probabilities of the options of each question about a text. */
  decisions(body, signal) {
    return this.#json("v1/decisions", { body, signal });
  }

  /**
   * Yields the JSON objects of a streamed answer up to `[DONE]`.
   *
   * Throws ApiError for a refusal, for an error inside the stream, and where the stream ends too early.
   */
  async *stream(path, body, signal) {
    const response = await this.#send(path, { body, signal });
    if (!(response.headers.get("content-type") ?? "").includes("text/event-stream")) {
      throw new ApiError("The server did not answer with a stream.", { status: response.status });
    }
    const parser = new EventParser();
    const reader = response.body.getReader();
    try {
      for (;;) {
        const { done, value } = await reader.read().catch((error) => {
          throw error.name === "AbortError" ? error : new ApiError("The connection broke off before the answer ended.");
        });
        if (done) throw new ApiError("The connection ended before the answer did.");
        for (const data of parser.feed(value)) {
          if (data === "[DONE]") return;
          const event = parsed(data);
          if (event?.error) throw fault(event, response.status);
          if (event) yield event;
        }
      }
    } finally {
      reader.cancel().catch(() => {}); // tells the server to stop, whatever the reason
    }
  }

  async #json(path, options) {
    const response = await this.#send(path, options);
    const value = parsed(await response.text());
    if (value === null) throw new ApiError("The server's answer is not JSON.", { status: response.status });
    return value;
  }

  async #send(path, { body, signal }) {
    const headers = {};
    if (this.key()) headers.Authorization = `Bearer ${this.key()}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), {
        method: body ? "POST" : "GET",
        headers,
        body: body && JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw fault(parsed(await response.text().catch(() => "")), response.status, response.headers);
    return response;
  }
}

function fault(body, status, headers) {
  const error = body?.error;
  let message = typeof error === "string" ? error : error?.message;
  message ||= `The server answered with status ${status}.`;
  const wait = headers?.get("retry-after");
  if (wait && /^\d+$/.test(wait)) message += ` Try again in ${wait} s.`;
  return new ApiError(message, { status, type: error?.type, param: error?.param, code: error?.code });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
