/** The question that is being written: kept soon after each change, by the conversation's id. */

import { writeDraft } from "./preferences";

const AFTER_MS = 250;

export class Draft {
  #waiting: { id: string; text: string } | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    addEventListener("pagehide", () => this.save());
  }

  changed(id: string, text: string): void {
    if (this.#waiting && this.#waiting.id !== id) this.save();
    this.#waiting = { id, text };
    clearTimeout(this.#timer);
    if (text === "") this.save();
    else this.#timer = setTimeout(() => this.save(), AFTER_MS);
  }

  save(): void {
    clearTimeout(this.#timer);
    if (this.#waiting) writeDraft(this.#waiting.id, this.#waiting.text);
    this.#waiting = undefined;
  }
}
