/** The list of conversations: search, open, rename, export, delete. */

import type { Summary } from "./conversation";
import { el, type Icon, icon, iconButton } from "./dom";
import { openMenu } from "./menu";
import type { Preferences } from "./preferences";
import * as wording from "./wording";

export interface SidebarActions {
  fresh(): void;
  search(text: string): void;
  rename(id: string, title: string): void;
  remove(summary: Summary): void;
  export(id: string, form: "markdown" | "json"): void;
  import(files: File[]): void;
  settings(): void;
  /** to the next of the system's colours, light, dark */
  theme(): void;
  close(): void;
  /** The one that is shown is wanted. */
  chosen(): void;
}

const SEARCH_AFTER_MS = 200;
const THEMES: Record<Preferences["theme"], [Icon, string]> = {
  system: ["auto", "Colours: as the system has them"],
  light: ["sun", "Colours: light"],
  dark: ["moon", "Colours: dark"],
};

export class Sidebar {
  readonly element: HTMLElement;
  readonly #list = el("div", { class: "chats" });
  readonly #search: HTMLInputElement;
  readonly #theme = iconButton("auto", "", () => this.actions.theme());
  #timer: ReturnType<typeof setTimeout> | undefined;
  #shown = "";

  constructor(private readonly actions: SidebarActions) {
    const picker = el("input", {
      type: "file",
      accept: ".json,application/json",
      multiple: true,
      hidden: true,
      "aria-label": "Files to import",
      onchange: () => {
        actions.import([...(picker.files ?? [])]);
        picker.value = "";
      },
    });
    this.#search = el("input", {
      type: "search",
      placeholder: "Search chats",
      "aria-label": "Search chats",
      oninput: () => {
        clearTimeout(this.#timer);
        this.#timer = setTimeout(() => actions.search(this.#search.value.trim()), SEARCH_AFTER_MS);
      },
      onkeydown: (event: KeyboardEvent) => {
        if (event.key === "Escape" && this.#search.value !== "") {
          event.stopPropagation();
          this.#search.value = "";
          actions.search("");
        } else if (event.key === "ArrowDown") {
          event.preventDefault();
          this.#list.querySelector("a")?.focus();
        }
      },
    });
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.element = el(
      "nav",
      { class: "sidebar", id: "sidebar", "aria-label": "Chats" },
      el(
        "div",
        { class: "sidebar-head" },
        el("span", { class: "brand" }, "chatserve"),
        iconButton("close", "Close the list", () => actions.close(), { class: "only-narrow" }),
      ),
      el(
        "button",
        {
          type: "button",
          class: "new-chat",
          onclick: () => actions.fresh(),
          title: "New chat (Ctrl+Shift+O)",
        },
        icon("plus"),
        "New chat",
      ),
      el("div", { class: "search" }, icon("search"), this.#search),
      this.#list,
      el(
        "div",
        { class: "sidebar-foot" },
        iconButton("import", "Import chats", () => picker.click()),
        picker,
        el(
          "a",
          {
            class: "icon-button",
            href: "/status",
            title: "The server's status",
            "aria-label": "The server's status",
          },
          icon("pulse"),
        ),
        this.#theme,
        iconButton("gear", "Settings", () => actions.settings()),
      ),
    );
  }

  showTheme(theme: Preferences["theme"]): void {
    const [name, label] = THEMES[theme];
    this.#theme.replaceChildren(icon(name));
    for (const attribute of ["title", "aria-label"]) this.#theme.setAttribute(attribute, label);
  }

  focusSearch(): void {
    this.#search.focus();
    this.#search.select();
  }

  sync(summaries: Summary[], current: string, running: Set<string>): void {
    // an answer that comes must not build the list anew
    const shown = JSON.stringify([
      current,
      [...running],
      summaries.map(({ id, title, changed_at }) => [id, title, wording.day(changed_at)]),
    ]);
    if (shown === this.#shown || this.#list.querySelector("input")) return;
    this.#shown = shown;
    const focused = (document.activeElement as HTMLElement | null)?.dataset?.id;
    const groups: HTMLElement[] = [];
    let heading = "";
    let list = el("ul");
    for (const summary of summaries) {
      const day = wording.day(summary.changed_at);
      if (day !== heading) {
        heading = day;
        list = el("ul", { "aria-label": day });
        groups.push(el("h2", {}, day), list);
      }
      list.append(this.#entry(summary, current, running.has(summary.id)));
    }
    if (groups.length === 0) {
      const text = this.#search.value === "" ? "No chats yet" : "No chat has this text";
      groups.push(el("p", { class: "no-chats" }, text));
    }
    this.#list.replaceChildren(...groups);
    if (focused) this.#link(focused)?.focus();
  }

  /** The conversation before or after this one in the list. */
  neighbour(current: string, by: number): string | undefined {
    const links = [...this.#list.querySelectorAll("a")];
    const at = links.findIndex((link) => link.dataset.id === current);
    return links[at < 0 ? 0 : at + by]?.dataset.id;
  }

  #link(id: string): HTMLElement | null {
    return this.#list.querySelector(`a[data-id="${CSS.escape(id)}"]`);
  }

  #entry(summary: Summary, current: string, isRunning: boolean): HTMLElement {
    const title = summary.title || "Untitled";
    const link = el(
      "a",
      {
        href: `#/c/${summary.id}`,
        "data-id": summary.id,
        "aria-current": summary.id === current ? "page" : undefined,
        title,
        // the address changes only for another one
        onclick: () => summary.id === current && this.actions.chosen(),
      },
      el("span", { class: "chat-title", dir: "auto" }, title),
      summary.models.length > 1 && icon("columns"),
      isRunning && el("span", { class: "running", role: "img", "aria-label": "answering" }),
    );
    const more = iconButton("more", `More for ${title}`, () =>
      openMenu(more, [
        { label: "Rename", run: () => this.#rename(item, link, summary) },
        { label: "Export as Markdown", run: () => this.actions.export(summary.id, "markdown") },
        { label: "Export as JSON", run: () => this.actions.export(summary.id, "json") },
        { label: "Delete", isDangerous: true, run: () => this.actions.remove(summary) },
      ]),
    );
    more.setAttribute("aria-haspopup", "menu");
    const item = el("li", {}, link, more);
    return item;
  }

  #rename(item: HTMLElement, link: HTMLElement, summary: Summary): void {
    const input = el("input", { "aria-label": "Title", dir: "auto", maxlength: 200 });
    input.value = summary.title;
    let isDone = false;
    const finish = (isKept: boolean) => {
      if (isDone) return;
      isDone = true;
      input.replaceWith(link);
      link.focus();
      const title = input.value.trim();
      if (isKept && title !== summary.title) this.actions.rename(summary.id, title);
    };
    input.addEventListener("blur", () => finish(true));
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") finish(false);
    });
    item.replaceChild(input, link);
    input.select();
  }

  #key(event: KeyboardEvent): void {
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    const links = [...this.#list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement as HTMLAnchorElement);
    if (at < 0) return;
    event.preventDefault();
    if (event.key === "ArrowUp" && at === 0) this.#search.focus();
    else links[at + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
  }
}
