/** Conversations that only this browser keeps: IndexedDB, or the page's memory where there is none. */

import { type Conversation, type Summary, summaryOf } from "./conversation";
import { readConversation } from "./reading";
import { Conflict, hasText, type Store } from "./store";

const TABLE = "conversations";

export class BrowserStore implements Store {
  readonly #databases = new Map<string, Promise<IDBDatabase>>();

  /** `name` is asked each time: who uses this browser may change. */
  constructor(private readonly name: () => string) {}

  async list(search: string): Promise<Summary[]> {
    const all = await this.#run("readonly", (table) => table.getAll());
    return all
      .map(readConversation)
      .filter((each) => each !== null && (search === "" || hasText(each, search)))
      .map((each) => summaryOf(each as Conversation))
      .sort((a, b) => b.changed_at - a.changed_at);
  }

  async get(id: string): Promise<Conversation | null> {
    return readConversation(await this.#run("readonly", (table) => table.get(id)));
  }

  async put(conversation: Conversation): Promise<Summary> {
    const kept = { ...structuredClone(conversation), revision: conversation.revision + 1 };
    let newer: Conversation | null = null;
    // one transaction: no other tab comes between the look and the write
    await this.#run("readwrite", (table) => {
      const look = table.get(conversation.id);
      look.onsuccess = () => {
        const there = readConversation(look.result);
        if (there && there.revision !== conversation.revision) newer = there;
        else table.put(kept);
      };
      return look;
    });
    if (newer) throw new Conflict(newer);
    return summaryOf(kept);
  }

  async remove(id: string): Promise<void> {
    await this.#run("readwrite", (table) => table.delete(id));
  }

  async clear(): Promise<void> {
    await this.#run("readwrite", (table) => table.clear());
  }

  async #run<T>(
    mode: IDBTransactionMode,
    ask: (table: IDBObjectStore) => IDBRequest<T>,
  ): Promise<T> {
    const name = this.name();
    const opened = this.#databases.get(name) ?? open(name);
    this.#databases.set(name, opened);
    const database = await opened;
    return new Promise((resolve, reject) => {
      const transaction = database.transaction(TABLE, mode);
      const asked = ask(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(asked.result);
      const fail = () =>
        reject(new Error(`this browser keeps nothing: ${transaction.error ?? ""}`));
      transaction.onerror = fail;
      transaction.onabort = fail;
    });
  }
}

function open(name: string): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const asked = indexedDB.open(name, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore(TABLE, { keyPath: "id" });
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(new Error(`this browser keeps nothing: ${asked.error ?? ""}`));
  });
}
