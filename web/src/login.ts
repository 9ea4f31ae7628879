/** Asks for the API key when the server wants one, once for everybody who is refused. */

import type { ApiError } from "./api";
import type { Banners } from "./banner";
import { askKey } from "./dialogs";
import { keepKey, key } from "./key";

export class Login {
  #asked: Promise<boolean> | undefined;
  /** the user has closed the dialog */
  #isDeclined = false;

  constructor(
    private readonly banners: Banners,
    private readonly onKey: () => void,
  ) {}

  /** Resolves with whether there is another key. `isAsked`: the user has just done what needs one. */
  async need(error: ApiError, isAsked = false): Promise<boolean> {
    // what was under way when the dialog was closed does not open it again
    if (this.#isDeclined && !isAsked) return false;
    this.#asked ??= this.#ask(error).finally(() => {
      this.#asked = undefined;
    });
    return this.#asked;
  }

  async #ask(error: ApiError): Promise<boolean> {
    const reason = key() ? error.message : "It is the one that the server was started with.";
    const given = await askKey(reason);
    this.#isDeclined = given === null;
    if (!given) {
      this.banners.show("locked", "This server asks for an API key.", {
        label: "Log in",
        run: () => void this.need(error, true),
      });
      return false;
    }
    this.banners.hide("locked");
    keepKey(given.key, given.isRemembered);
    this.onKey();
    return true;
  }
}
