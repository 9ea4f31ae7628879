/**
 * Conversations that the server keeps, and a place in this browser for those it has no room for.
 *
 * What it refuses for want of room, or because its file cannot be used, waits here and is found
 * again; the first save that goes through takes it over.
 */

import { ApiError } from "./api";
import { type Conversation, merge, type Summary } from "./conversation";
import type { Store } from "./store";

/** As the spare place has it; `server_revision` is what its change was made on. */
type Spare = Conversation & { server_revision?: number };

const HAS_NO_ROOM = ["storage_full", "storage_unavailable", "body_too_large"];

function hasNoRoom(error: unknown): error is ApiError {
  return error instanceof ApiError && HAS_NO_ROOM.includes(error.code);
}

export class SpareStore implements Store {
  constructor(
    private readonly server: Store,
    private readonly spare: Store,
  ) {}

  async list(search: string): Promise<Summary[]> {
    const waiting = await this.#waiting(() => this.spare.list(search), []);
    const kept = await this.server.list(search).catch((error: unknown) => {
      if (!hasNoRoom(error)) throw error;
      return [];
    });
    const ids = new Set(waiting.map(({ id }) => id));
    return [...waiting, ...kept.filter(({ id }) => !ids.has(id))].sort(
      (a, b) => b.changed_at - a.changed_at,
    );
  }

  async get(id: string): Promise<Conversation | null> {
    const kept = await this.server.get(id).catch((error: unknown) => {
      if (!hasNoRoom(error)) throw error;
      return null;
    });
    const waiting = await this.#waiting<Spare | null>(() => this.spare.get(id), null);
    if (!waiting) return kept;
    const { server_revision = 0, ...mine } = waiting;
    if (!kept) return { ...mine, revision: server_revision };
    return { ...merge(mine, kept), revision: kept.revision };
  }

  async put(conversation: Conversation, isLeaving = false): Promise<Summary> {
    try {
      const summary = await this.server.put(conversation, isLeaving);
      if (!isLeaving) await this.#waiting(() => this.spare.remove(conversation.id), undefined);
      return summary;
    } catch (error) {
      if (!hasNoRoom(error)) throw error;
      await this.#keepHere(conversation);
      const reason = `${error.message}; this chat stays in this browser`;
      throw new ApiError(reason, error.code, error.status, error.retryAfterS);
    }
  }

  async remove(id: string): Promise<void> {
    await this.#waiting(() => this.spare.remove(id), undefined);
    await this.server.remove(id);
  }

  async #keepHere(conversation: Conversation): Promise<void> {
    const there = await this.spare.get(conversation.id);
    const spare: Spare = {
      ...conversation,
      server_revision: conversation.revision,
      revision: there?.revision ?? 0,
    };
    await this.spare.put(spare);
  }

  /** A browser that keeps nothing has nothing waiting. */
  async #waiting<T>(ask: () => Promise<T>, nothing: T): Promise<T> {
    try {
      return await ask();
    } catch {
      return nothing;
    }
  }
}
