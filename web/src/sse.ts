/** Server-sent events out of bytes that are cut anywhere (WHATWG HTML §9.2). Knows no request. */

export interface ServerSentEvent {
  event: string;
  data: string;
}

const MAX_LINE_CHARS = 4 * 1024 * 1024;

export class SSEDecoder {
  #text = new TextDecoder("utf-8");
  #line = "";
  #skipNewline = false;
  #event = "";
  #data: string[] = [];

  /** `onComment` is told the lines that other readers skip. */
  constructor(private readonly onComment: (text: string) => void = () => {}) {}

  /** Take the next bytes and return the events that they complete. */
  feed(bytes: Uint8Array): ServerSentEvent[] {
    // a character that the cut went through waits inside the TextDecoder
    let text = this.#text.decode(bytes, { stream: true });
    const events: ServerSentEvent[] = [];
    if (text === "") return events;
    if (this.#skipNewline && text.startsWith("\n")) text = text.slice(1);
    this.#skipNewline = text.endsWith("\r");
    const lines = text.split(/\r\n|\n|\r/);
    const rest = lines.pop() ?? "";
    for (const line of lines) {
      const event = this.#take(this.#line + line);
      this.#line = "";
      if (event) events.push(event);
    }
    this.#line += rest;
    if (this.#line.length > MAX_LINE_CHARS) throw new Error("a line of the stream is too long");
    return events;
  }

  #take(line: string): ServerSentEvent | undefined {
    if (line === "") {
      const event = { event: this.#event || "message", data: this.#data.join("\n") };
      const isEvent = this.#data.length > 0;
      this.#event = "";
      this.#data = [];
      return isEvent ? event : undefined;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#event = value;
    else if (colon === 0) this.onComment(value);
    return undefined;
  }
}
