/**
 * The places where conversations are kept, the server and this browser, each with its library.
 *
 * The library of a place stays when the other is chosen: an answer that comes ends where its chat
 * is. What this browser keeps is apart for each API key. Knows no DOM.
 */

import { owned } from "./key";
import { type Kept, Library, type LibraryListener } from "./library";
import type { Preferences } from "./preferences";
import { NotKept } from "./store";
import { BrowserStore } from "./store-browser";
import { ServerStore } from "./store-server";
import { SpareStore } from "./store-spare";
import { copyAll } from "./transfer";

export type Place = Preferences["place"];

export class Keeping {
  /** false: the server has said that it keeps no conversations */
  serverKeeps = true;
  readonly #libraries = new Map<Place, Library>();
  readonly #inBrowser = new BrowserStore(() => owned("chatserve"));
  /** of chats that the server had no room for */
  readonly #spare = new BrowserStore(() => owned("chatserve-spare"));
  #search = "";

  constructor(
    public place: Place,
    private readonly listener: LibraryListener,
  ) {}

  /** That of the place that is chosen. */
  get library(): Library {
    let library = this.#libraries.get(this.place);
    if (!library) {
      const store =
        this.place === "server" ? new SpareStore(new ServerStore(), this.#spare) : this.#inBrowser;
      library = new Library(store, this.place, this.listener);
      this.#libraries.set(this.place, library);
    }
    return library;
  }

  /** Ask for the list; of those with a text, if one is given. Rejects with `NotKept`. */
  async list(search = this.#search): Promise<void> {
    this.#search = search;
    try {
      await this.library.refresh(search);
    } catch (error) {
      if (error instanceof NotKept) this.serverKeeps = false;
      throw error;
    }
  }

  /** The server keeps none: from now on they are kept here, and so is what was asked meanwhile. */
  stayHere(open: Kept): void {
    const server = this.#libraries.get("server");
    this.#libraries.delete("server");
    server?.close();
    if (this.place === "browser") return;
    this.place = "browser";
    this.library.adopt(open);
  }

  /** Copy what the other place has and this one has not; resolves with how many. */
  copyHere(): Promise<number> {
    const other = this.place === "server" ? this.#inBrowser : new ServerStore();
    return copyAll(other, this.library);
  }

  /** Try again what could not be saved. */
  retry(): void {
    for (const library of this.#libraries.values()) library.retry();
  }

  /** Save at once what is not saved: the page is being left. */
  leave(): void {
    for (const library of this.#libraries.values()) library.leave();
  }

  /** Wait for all saves; resolves with how many chats the server has not all of. */
  async settle(): Promise<number> {
    const libraries = [...this.#libraries.values()];
    const unsaved = new Set((await Promise.all(libraries.map((each) => each.settle()))).flat());
    for (const { id } of await this.#spare.list("").catch(() => [])) unsaved.add(id);
    return unsaved.size;
  }

  /** Save nothing any more, and leave nothing here that waits for room on the server. */
  async forget(): Promise<void> {
    for (const library of this.#libraries.values()) library.drop();
    await this.#spare.clear().catch(() => undefined);
  }
}
