/** Lines above the page: the server is gone, something is not saved, something was deleted. */

import { el, iconButton } from "./dom";

export class Banners {
  readonly element = el("div", { class: "banners", role: "status" });
  readonly #lines = new Map<string, HTMLElement>();

  /** One line a name; the same again replaces it. */
  show(name: string, text: string, action?: { label: string; run(): void }, forMs?: number): void {
    const line = el(
      "p",
      { class: `banner ${name}` },
      el("span", { dir: "auto" }, text),
      action && el("button", { type: "button", onclick: () => action.run() }, action.label),
      forMs !== undefined && iconButton("close", "Dismiss", () => this.hide(name)),
    );
    const there = this.#lines.get(name);
    if (there?.textContent === line.textContent && !action) return;
    if (there) there.replaceWith(line);
    else this.element.append(line);
    this.#lines.set(name, line);
    if (forMs !== undefined) {
      setTimeout(() => {
        if (this.#lines.get(name) === line) this.hide(name);
      }, forMs);
    }
  }

  hide(name: string): void {
    this.#lines.get(name)?.remove();
    this.#lines.delete(name);
  }
}
