/**
 * The chat that is open: the one that the address names, or a new one, and whose question is
 * written meanwhile. Knows the address and places where chats are kept, no elements.
 */

import { type Drafts, NEW, type Written } from "./drafts";
import type { Keeping } from "./keeping";
import type { Kept } from "./library";
import type { Notices } from "./notices";

export interface OpenChatListener {
  fresh(): Kept;
  /** Another is open; `written`: what is written in it already, null where that is shown. */
  shown(written: Written | null): void;
  /** It has come on the user's way to it. */
  reached(): void;
  /** There is none at the address. */
  missing(): void;
  changed(): void;
}

export class OpenChat {
  current: Kept;
  /** the chat that the address names, while it is on its way */
  #opening: string | undefined;

  constructor(
    private readonly keeping: Keeping,
    private readonly drafts: Drafts,
    private readonly notices: Notices,
    private readonly listener: OpenChatListener,
  ) {
    this.current = listener.fresh();
  }

  get isOnItsWay(): boolean {
    return this.#opening !== undefined;
  }

  /** Until the chat of the address is there: a new one, in which its question can be written. */
  start(): void {
    addEventListener("hashchange", () => void this.route());
    this.#opening = addressed();
    this.show(this.current);
  }

  fresh(): void {
    if (location.hash !== "" && location.hash !== "#/") location.hash = "#/";
    else this.show(this.listener.fresh());
  }

  show(kept: Kept): void {
    this.current = kept;
    const { id, messages } = kept.conversation;
    if (this.#opening === id) this.#opening = undefined;
    const writtenIn = this.#opening ?? (messages.length > 0 ? id : NEW);
    this.listener.shown(this.drafts.turnTo(writtenIn));
  }

  /** Open the chat that the address names. */
  async route(): Promise<void> {
    const id = addressed();
    if (id === undefined || id === this.current.conversation.id) {
      this.#arrived();
      if (id !== undefined) return;
      const isNew = this.current.conversation.messages.length === 0 && this.drafts.at === NEW;
      if (!isNew) this.show(this.listener.fresh());
      return;
    }
    this.#opening = id;
    this.listener.changed();
    await this.notices.try(() => this.#open(id));
    if (this.#opening === id) this.#arrived();
  }

  /** It has got its first question, and so an address. */
  named(): void {
    const { id } = this.current.conversation;
    this.drafts.giveTo(id);
    if (addressed() === id) return;
    history.pushState(null, "", `#/c/${id}`);
    this.listener.changed();
  }

  async #open(id: string): Promise<void> {
    const kept = await this.keeping.library.open(id);
    if (addressed() !== id) return;
    if (kept) {
      this.show(kept);
      this.listener.reached();
      return;
    }
    this.notices.tell("This chat is not here: it was deleted, or it is kept elsewhere.");
    // what was written for it is not lost, and is sent to no other
    this.listener.missing();
    if (this.drafts.at === id) this.drafts.giveTo(NEW);
    location.hash = "#/";
  }

  /** Nothing is on its way any more. */
  #arrived(): void {
    if (this.#opening === undefined) return;
    this.#opening = undefined;
    this.listener.changed();
  }
}

function addressed(): string | undefined {
  return /^#\/c\/([A-Za-z0-9_-]+)$/.exec(location.hash)?.[1];
}
