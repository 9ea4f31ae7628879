/** What can be done with the chats of the list: search, rename, delete, export, import. */

import type { Summary } from "./conversation";
import type { Keeping } from "./keeping";
import type { Kept } from "./library";
import type { Notices } from "./notices";
import { exportFile, type Form, importFile } from "./transfer";

export interface ShelfListener {
  renamed(): void;
  /** It is about to be deleted. */
  leaving(kept: Kept): void;
  removed(id: string): void;
  /** Who is asked by chats that name no model. */
  models(): string[];
}

export class Shelf {
  constructor(
    private readonly keeping: Keeping,
    private readonly notices: Notices,
    private readonly listener: ShelfListener,
  ) {}

  search(text: string): void {
    void this.notices.try(() => this.keeping.list(text));
  }

  rename(id: string, title: string): void {
    void this.notices.try(async () => {
      await this.keeping.library.rename(id, title);
      this.listener.renamed();
    });
  }

  remove(summary: Summary): void {
    void this.notices.try(async () => {
      const { library } = this.keeping;
      const kept = await library.open(summary.id);
      if (kept) this.listener.leaving(kept);
      await library.remove(summary.id);
      this.listener.removed(summary.id);
      if (!kept) return;
      const undo = () => library.add(kept.conversation);
      this.notices.deleted(summary.title || "Untitled", undo);
    });
  }

  export(id: string, form: Form): void {
    void this.notices.try(async () => {
      const kept = await this.keeping.library.open(id);
      if (kept) exportFile(kept.conversation, form);
    });
  }

  async import(files: File[]): Promise<void> {
    for (const file of files) {
      await this.notices.try(async () => {
        const id = await importFile(file, this.keeping.library, this.listener.models());
        if (id !== undefined) location.hash = `#/c/${id}`;
      });
    }
  }
}
