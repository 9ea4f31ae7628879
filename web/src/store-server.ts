/** Conversations that the server keeps, apart for each API key. */

import { ApiError, getJson, record, request } from "./api";
import type { Conversation, Summary } from "./conversation";
import { readConversation, readSummary } from "./reading";
import { Conflict, NotKept, type Store } from "./store";

const ROOT = "/page/conversations";
/** what a browser sends for a page that is being left */
const MAX_KEEPALIVE_BYTES = 60_000;

export class ServerStore implements Store {
  async list(search: string): Promise<Summary[]> {
    const query = search === "" ? "" : `?search=${encodeURIComponent(search)}`;
    const { conversations, is_kept } = record(await getJson(ROOT + query));
    if (is_kept === false) throw new NotKept();
    return (Array.isArray(conversations) ? conversations : [])
      .map(readSummary)
      .filter((each) => each !== null);
  }

  async get(id: string): Promise<Conversation | null> {
    try {
      return readConversation(await getJson(`${ROOT}/${encodeURIComponent(id)}`));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null;
      throw error;
    }
  }

  async put(conversation: Conversation, isLeaving = false): Promise<Summary> {
    const body = JSON.stringify(conversation);
    const keepalive = isLeaving && new Blob([body]).size < MAX_KEEPALIVE_BYTES;
    try {
      const path = `${ROOT}/${encodeURIComponent(conversation.id)}`;
      const summary = readSummary(await getJson(path, { method: "PUT", body, keepalive }));
      if (!summary) throw new ApiError("the server does not say what it kept", "bad_answer", 200);
      return summary;
    } catch (error) {
      const isConflict = error instanceof ApiError && error.status === 409;
      const newer = isConflict ? readConversation(record(error.body).conversation) : null;
      if (newer) throw new Conflict(newer);
      throw error;
    }
  }

  async remove(id: string): Promise<void> {
    try {
      await request(`${ROOT}/${encodeURIComponent(id)}`, { method: "DELETE" });
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
    }
  }
}
