/** Answers that another tab writes, until nothing has been heard of them for a while. */

/** a tab that writes an answer saves it oftener than this */
const FORGET_AFTER_MS = 12_000;

export class Elsewhere {
  readonly #known = new Map<
    string,
    { messages: ReadonlySet<string>; timer: ReturnType<typeof setTimeout> }
  >();

  constructor(private readonly onForgotten: () => void) {}

  /** The messages of a conversation that are being written in another tab. */
  messages(conversation: string): ReadonlySet<string> {
    return this.#known.get(conversation)?.messages ?? new Set();
  }

  heard(conversation: string, messages: string[]): void {
    clearTimeout(this.#known.get(conversation)?.timer);
    this.#known.delete(conversation);
    if (messages.length === 0) return;
    const timer = setTimeout(() => {
      this.#known.delete(conversation);
      this.onForgotten();
    }, FORGET_AFTER_MS);
    this.#known.set(conversation, { messages: new Set(messages), timer });
  }
}
