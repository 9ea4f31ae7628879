/**
 * The conversations of this browser's user: their list, those that are open, and their saves.
 *
 * An open conversation is saved some time after each change, one save after the other. Who changed
 * it meanwhile (another tab, another machine) is joined with ours, never overwritten. Knows a store,
 * no DOM.
 */

import { ApiError, isAbort } from "./api";
import {
  type Conversation,
  merge,
  newConversation,
  type Sampling,
  type Summary,
  summaryOf,
  touch,
} from "./conversation";
import { Conflict, type Store } from "./store";

const SAVE_AFTER_MS = 400;
const MAX_RETRY_MS = 15_000;
const PATIENCE_MS = 10_000;

/** What tabs tell each other. */
interface Notice {
  kind: "saved" | "removed";
  id: string;
  revision: number;
  /** messages that are being written in that tab */
  writing: string[];
}

export interface LibraryListener {
  /** The list, or something in it, is another. */
  listed(): void;
  /** A conversation that is open has got turns from elsewhere. */
  merged(kept: Kept): void;
  removed(id: string): void;
  /** Which of its messages are being written here, for the other tabs. */
  writing(conversation: Conversation): string[];
  /** These messages of a conversation are being written in another tab. */
  writtenElsewhere(id: string, messages: string[]): void;
  /** null: everything is saved again. */
  saveFailed(reason: string | null): void;
}

export class Library {
  summaries: Summary[] = [];
  readonly #opened = new Map<string, Kept>();
  #tabs: BroadcastChannel | undefined;
  #search = "";

  constructor(
    readonly store: Store,
    readonly place: "server" | "browser",
    private readonly listener: LibraryListener,
  ) {
    if ("BroadcastChannel" in globalThis) {
      this.#tabs = new BroadcastChannel(`chatserve.${place}`);
      this.#tabs.onmessage = (event: MessageEvent<Notice>) => void this.#hear(event.data);
    }
  }

  /** Those that are open. */
  get openOnes(): Kept[] {
    return [...this.#opened.values()];
  }

  close(): void {
    // what is open goes on being saved, without telling
    this.#tabs?.close();
    this.#tabs = undefined;
  }

  /** Ask the store for the list; of those with a text, if one is given. */
  async refresh(search = this.#search): Promise<void> {
    this.#search = search;
    const found = await this.store.list(search);
    if (search !== this.#search) return;
    this.summaries = found;
    this.listener.listed();
  }

  fresh(models: string[], system = "", sampling: Sampling = {}): Kept {
    return this.#keep(newConversation(models, system, sampling));
  }

  /** Go on with what another library had opened: from now on it is kept here. */
  adopt(kept: Kept): void {
    kept.conversation.revision = 0;
    this.#opened.set(kept.conversation.id, kept);
    kept.moveTo(
      this.store,
      this.#listenerOf(() => kept),
    );
    if (kept.conversation.messages.length > 0) kept.changed(0);
  }

  /** null: there is none of this id. */
  async open(id: string): Promise<Kept | null> {
    const open = this.#opened.get(id);
    if (open) return open;
    const found = await this.store.get(id);
    return found ? (this.#opened.get(id) ?? this.#keep(found)) : null;
  }

  /** Take in what came from a file. */
  async add(conversation: Conversation): Promise<void> {
    await this.#keep({ ...conversation, revision: 0 }).save();
  }

  async rename(id: string, title: string): Promise<void> {
    const kept = await this.open(id);
    if (!kept) return;
    kept.conversation.title = title;
    kept.conversation.is_titled = title !== "";
    touch(kept.conversation);
    await kept.save();
  }

  async remove(id: string): Promise<void> {
    const kept = this.#opened.get(id);
    if (kept) kept.isRemoved = true;
    try {
      await this.store.remove(id);
    } catch (error) {
      // it is still there, and so is what was not saved of it
      if (kept) {
        kept.isRemoved = false;
        if (kept.isDirty) kept.changed();
      }
      throw error;
    }
    this.forget(id);
    this.#tell({ kind: "removed", id, revision: 0, writing: [] });
  }

  forget(id: string): void {
    this.#opened.delete(id);
    this.summaries = this.summaries.filter((summary) => summary.id !== id);
    this.listener.listed();
  }

  /** Save at once what is not saved: the page is being left. */
  leave(): void {
    for (const kept of this.openOnes) kept.leave();
  }

  /**
   * Wait for the saves that are due or under way, but not for ever; resolves with the ids of those
   * that failed or are not over.
   */
  async settle(patienceMs = PATIENCE_MS): Promise<string[]> {
    const open = this.openOnes;
    const patience = new Promise((resolve) => setTimeout(resolve, patienceMs));
    await Promise.race([Promise.all(open.map((kept) => kept.settle())), patience]);
    return open.filter((kept) => !kept.isSaved).map((kept) => kept.conversation.id);
  }

  /** Save nothing any more. */
  drop(): void {
    for (const kept of this.openOnes) kept.isRemoved = true;
  }

  /** Try again what could not be saved. */
  retry(): void {
    for (const kept of this.openOnes) if (kept.isDirty) void kept.save();
  }

  #keep(conversation: Conversation): Kept {
    const kept: Kept = new Kept(
      conversation,
      this.store,
      this.#listenerOf(() => kept),
    );
    this.#opened.set(conversation.id, kept);
    return kept;
  }

  #listenerOf(kept: () => Kept): KeptListener {
    return {
      saved: (summary) => {
        this.summaries = [summary, ...this.summaries.filter((each) => each.id !== summary.id)].sort(
          (a, b) => b.changed_at - a.changed_at,
        );
        this.listener.listed();
        const { id, revision } = summary;
        this.#tell({
          kind: "saved",
          id,
          revision,
          writing: this.listener.writing(kept().conversation),
        });
      },
      merged: () => this.listener.merged(kept()),
      failed: (reason) => this.listener.saveFailed(reason),
    };
  }

  #tell(notice: Notice): void {
    this.#tabs?.postMessage(notice);
  }

  async #hear(notice: Notice): Promise<void> {
    const kept = this.#opened.get(notice.id);
    try {
      if (notice.kind === "removed") {
        if (kept) kept.isRemoved = true;
        this.forget(notice.id);
        this.listener.removed(notice.id);
      } else {
        this.listener.writtenElsewhere(notice.id, notice.writing);
        if (kept && kept.conversation.revision < notice.revision) await kept.reload();
        await this.refresh();
      }
    } catch {
      // the store is out of reach; whoever saves next finds out
    }
  }
}

interface KeptListener {
  saved(summary: Summary): void;
  merged(): void;
  failed(reason: string | null): void;
}

/** A conversation that is open. */
export class Kept {
  isDirty = false;
  isRemoved = false;
  #isSaving = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #due = 0;
  #saving: Promise<void> = Promise.resolve();
  #retryMs = 1000;

  constructor(
    readonly conversation: Conversation,
    private store: Store,
    private listener: KeptListener,
  ) {}

  moveTo(store: Store, listener: KeptListener): void {
    this.store = store;
    this.listener = listener;
  }

  get isSaved(): boolean {
    return !this.isDirty && !this.#isSaving;
  }

  /** It was changed: save it soon. An answer that is coming asks for longer pauses. */
  changed(afterMs = SAVE_AFTER_MS): void {
    this.isDirty = true;
    const due = Date.now() + afterMs;
    if (this.#timer !== undefined && this.#due <= due) return;
    clearTimeout(this.#timer);
    this.#due = due;
    this.#timer = setTimeout(() => void this.save(), afterMs);
  }

  async save(isLeaving = false): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.isDirty = true;
    this.#saving = this.#saving.then(() => this.#saveNow(isLeaving));
    await this.#saving;
  }

  /** The page is being left. */
  leave(): void {
    if (this.isRemoved) return;
    if (this.#isSaving) {
      // the save that is under way may be cut: nothing waits for it
      void this.store.put(this.conversation, true).catch(() => undefined);
    } else if (this.isDirty) void this.save(true);
  }

  async settle(): Promise<void> {
    await (this.isDirty ? this.save() : this.#saving);
  }

  /** Join with what the store has. */
  async reload(): Promise<void> {
    const theirs = await this.store.get(this.conversation.id);
    if (theirs) this.#join(theirs);
  }

  #join(theirs: Conversation): void {
    // the object stays: whoever writes an answer into it goes on
    const joined = merge(this.conversation, theirs);
    const ours = new Map(this.conversation.messages.map((each) => [each.id, each]));
    joined.messages = joined.messages.map((each) => {
      const mine = ours.get(each.id);
      return mine ? Object.assign(mine, each) : each;
    });
    Object.assign(this.conversation, joined);
    this.listener.merged();
  }

  async #saveNow(isLeaving: boolean): Promise<void> {
    for (let tries = 0; this.isDirty && !this.isRemoved; tries++) {
      this.isDirty = false;
      this.#isSaving = true;
      try {
        const summary = await this.store.put(this.conversation, isLeaving);
        this.conversation.revision = summary.revision;
        this.#retryMs = 1000;
        this.listener.saved(summaryOf(this.conversation));
        this.listener.failed(null);
      } catch (error) {
        if (isAbort(error)) return;
        this.isDirty = true;
        if (error instanceof Conflict && tries < 5) {
          this.#join(error.newer);
          this.conversation.revision = error.newer.revision;
          continue;
        }
        if (error instanceof ApiError && error.status === 404 && this.conversation.revision > 0) {
          // deleted elsewhere while it was answered here: it is kept anew
          this.conversation.revision = 0;
          continue;
        }
        this.listener.failed(error instanceof Error ? error.message : String(error));
        this.changed(this.#retryMs);
        this.#retryMs = Math.min(this.#retryMs * 2, MAX_RETRY_MS);
        return;
      } finally {
        this.#isSaving = false;
      }
    }
  }
}
