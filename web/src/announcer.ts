/** Tells screen readers what happens, in pieces that can be listened to. */

import { el } from "./dom";

const PAUSE_MS = 2500;

export class Announcer {
  readonly element = el("div", { class: "off-screen", role: "status", "aria-live": "polite" });
  #waiting: string[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** Say it soon, together with what else comes. */
  say(text: string): void {
    if (text === "") return;
    this.#waiting.push(text);
    this.#timer ??= setTimeout(() => this.#speak(), this.element.hasChildNodes() ? PAUSE_MS : 100);
  }

  #speak(): void {
    this.#timer = undefined;
    // a new element each: readers tell what is added, not what was there
    this.element.replaceChildren(el("p", {}, this.#waiting.join("\n")));
    this.#waiting = [];
  }
}
