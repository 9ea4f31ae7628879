/** The parts of the page in their places: list, messages, question, panel. Knows no conversation. */

import { el, iconButton } from "./dom";

const NARROW = matchMedia("(max-width: 48rem)");

export interface Parts {
  sidebar: HTMLElement;
  title: HTMLElement;
  picker: HTMLElement;
  banners: HTMLElement;
  thread: HTMLElement;
  toEnd: HTMLElement;
  composer: HTMLElement;
  panel: HTMLElement;
  announcer: HTMLElement;
}

export class Frame {
  readonly #panelButton: HTMLElement;
  readonly #sidebarButton: HTMLElement;

  constructor(
    private readonly root: HTMLElement,
    private readonly parts: Parts,
    toQuestion: () => void,
  ) {
    this.#panelButton = iconButton("sliders", "Sampling (Alt+S)", () => this.togglePanel(), {
      "aria-controls": "sampling",
      "aria-expanded": "false",
    });
    this.#sidebarButton = iconButton("menu", "List of chats (Alt+B)", () => this.toggleSidebar(), {
      "aria-controls": "sidebar",
      "aria-expanded": "true",
    });
    const skip = (event: Event) => {
      event.preventDefault();
      toQuestion();
    };
    root.append(
      el("a", { class: "skip", href: "#question", onclick: skip }, "To the question"),
      parts.sidebar,
      el("div", { class: "veil", onclick: () => this.showSidebar(false) }),
      el(
        "main",
        { class: "main" },
        el(
          "header",
          { class: "bar" },
          this.#sidebarButton,
          parts.title,
          parts.picker,
          el("div", { class: "bar-tools" }, this.#panelButton),
        ),
        parts.banners,
        parts.thread,
        el("div", { class: "dock" }, parts.toEnd, parts.composer),
      ),
      parts.panel,
      parts.announcer,
    );
    this.showSidebar(!this.isNarrow);
    NARROW.addEventListener("change", () => this.showSidebar(!this.isNarrow));
  }

  /** A phone's width: the list lies above the messages. */
  get isNarrow(): boolean {
    return NARROW.matches;
  }

  showSidebar(isShown: boolean): void {
    this.root.classList.toggle("has-sidebar", isShown);
    this.parts.sidebar.inert = !isShown;
    this.#sidebarButton.setAttribute("aria-expanded", String(isShown));
  }

  /** What was chosen from the list is to be seen. */
  chosen(): void {
    if (this.isNarrow) this.showSidebar(false);
  }

  toggleSidebar(): void {
    this.showSidebar(!this.root.classList.contains("has-sidebar"));
  }

  showPanel(isShown: boolean): void {
    const { panel } = this.parts;
    const hadFocus = panel.contains(document.activeElement);
    panel.hidden = !isShown;
    this.#panelButton.setAttribute("aria-expanded", String(isShown));
    if (isShown) panel.querySelector("textarea")?.focus();
    else if (hadFocus) this.#panelButton.focus();
  }

  togglePanel(): void {
    this.showPanel(Boolean(this.parts.panel.hidden));
  }
}
