/**
 * Questions that are being written, by the id of their chat: text and files.
 *
 * Both last as long as the page; the text is kept in the browser, too, soon after each change.
 */

import type { TextFile } from "./conversation";
import { forgetDrafts, readDraft, writeDraft } from "./preferences";

/** of a chat that nothing was asked in yet */
export const NEW = "new";
const AFTER_MS = 250;

export interface Written {
  text: string;
  files: TextFile[];
}

export class Drafts {
  /** whose question is being written */
  at: string | undefined;
  readonly #written = new Map<string, Written>();
  readonly #unsaved = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    addEventListener("pagehide", () => this.save());
  }

  /** What is being written is this now. */
  changed(written: Written): void {
    const id = this.at ?? NEW;
    this.#written.set(id, written);
    this.#unsaved.add(id);
    clearTimeout(this.#timer);
    if (written.text === "") this.save();
    else this.#timer = setTimeout(() => this.save(), AFTER_MS);
  }

  /** Go on with the question of another chat; null where it is the one already. */
  turnTo(id: string): Written | null {
    if (id === this.at) return null;
    this.save();
    this.at = id;
    return this.#written.get(id) ?? { text: readDraft(id), files: [] };
  }

  /** What is being written belongs to this chat from now on, and not to the one before. */
  giveTo(id: string): void {
    const written = this.#written.get(this.at ?? NEW);
    if (id === this.at) return;
    this.changed({ text: "", files: [] });
    this.at = id;
    if (written) this.changed(written);
  }

  save(): void {
    clearTimeout(this.#timer);
    for (const id of this.#unsaved) {
      const { text = "", files = [] } = this.#written.get(id) ?? {};
      writeDraft(id, text);
      if (text === "" && files.length === 0 && id !== this.at) this.#written.delete(id);
    }
    this.#unsaved.clear();
  }

  /** Leave nothing of any of them. */
  forget(): void {
    clearTimeout(this.#timer);
    this.#unsaved.clear();
    this.#written.clear();
    forgetDrafts();
  }
}
