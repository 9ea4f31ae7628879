/** Lines above the page, and what is done about what has failed. */

import { ApiError } from "./api";
import type { Banners } from "./banner";
import type { Login } from "./login";

const DISMISSED_MS = 10_000;

export class Notices {
  #isGone = false;

  constructor(
    private readonly banners: Banners,
    private readonly login: Login,
    /** look whether the server is there */
    private readonly lookForServer: () => void,
  ) {}

  tell(text: string): void {
    this.banners.show("notice", text, undefined, DISMISSED_MS);
  }

  /** null: it answers again. */
  gone(error: ApiError | null): void {
    this.#isGone = error !== null;
    if (!error) {
      this.banners.hide("gone");
      return;
    }
    const text = error.isUnreachable
      ? "The server does not answer. Nothing is lost; this page goes on when it is back."
      : `The server cannot answer now: ${error.message}`;
    this.banners.show("gone", text, { label: "Try now", run: this.lookForServer });
  }

  /** null: everything is saved again. */
  unsaved(reason: string | null): void {
    if (reason === null) this.banners.hide("unsaved");
    else if (!this.#isGone) {
      this.banners.show("unsaved", `Not saved yet: ${reason}. It is tried again.`);
    }
  }

  deleted(title: string, undo: () => Promise<void>): void {
    const run = () => {
      this.banners.hide("undo");
      void this.try(undo);
    };
    this.banners.show("undo", `Deleted: ${title}`, { label: "Undo", run }, DISMISSED_MS);
  }

  /** Do what may fail, and tell it in a line. */
  async try(act: () => Promise<void>): Promise<void> {
    try {
      await act();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        await this.login.need(error);
      } else if (error instanceof ApiError && error.isUnreachable) {
        this.lookForServer();
      } else {
        const text = error instanceof Error ? error.message : String(error);
        this.tell(text.charAt(0).toUpperCase() + text.slice(1));
      }
    }
  }
}
