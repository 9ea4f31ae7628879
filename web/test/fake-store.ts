import { ApiError } from "../src/api";
import { type Conversation, type Summary, summaryOf } from "../src/conversation";
import { Conflict, type Store } from "../src/store";

/** Keeps revisions as the server does. */
export class FakeStore implements Store {
  readonly kept = new Map<string, Conversation>();
  fails: Error | null = null;
  puts = 0;

  async list(): Promise<Summary[]> {
    return [...this.kept.values()].map(summaryOf);
  }

  async get(id: string): Promise<Conversation | null> {
    return structuredClone(this.kept.get(id) ?? null);
  }

  async put(conversation: Conversation): Promise<Summary> {
    this.puts += 1;
    const document = structuredClone(conversation);
    await Promise.resolve();
    if (this.fails) throw this.fails;
    const there = this.kept.get(document.id);
    if (!there && document.revision > 0) throw new ApiError("gone", "not_found", 404);
    if (there && there.revision !== document.revision) throw new Conflict(structuredClone(there));
    document.revision += 1;
    this.kept.set(document.id, document);
    return summaryOf(document);
  }

  async remove(id: string): Promise<void> {
    this.kept.delete(id);
  }
}
