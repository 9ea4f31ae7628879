/** One message as it is shown. Knows elements and what may be done; asks its owner to do it. */

import type { Answering } from "./answering";
import type { Message } from "./conversation";
import { copyButton, el, icon, iconButton } from "./dom";
import { LiveMarkdown } from "./live-markdown";
import { thoughtsOf } from "./thinking";
import * as wording from "./wording";

/** What can be asked of a message. */
export interface MessageActions {
  edit(message: Message, text: string): void;
  regenerate(message: Message): void;
  continue(message: Message): void;
  /** Show the version before (-1) or after (1). */
  step(message: Message, by: number): void;
}

export interface MessageState {
  message: Message;
  /** who says it, as it is shown */
  name: string;
  isNameHidden: boolean;
  /** which of how many versions, from 1 */
  version: number;
  versions: number;
  isLast: boolean;
  isBusy: boolean;
  answering?: Answering | undefined;
  /** another tab writes it */
  isElsewhere: boolean;
}

function versionButtons(state: MessageState, actions: MessageActions): HTMLElement | null {
  const { message, version, versions } = state;
  if (versions < 2) return null;
  return el(
    "span",
    { class: "versions", role: "group", "aria-label": "Versions" },
    iconButton("left", "Version before", () => actions.step(message, -1), {
      disabled: version === 1 || state.isBusy,
    }),
    el("span", {}, `${version}/${versions}`),
    iconButton("right", "Version after", () => actions.step(message, 1), {
      disabled: version === versions || state.isBusy,
    }),
  );
}

export class QuestionView {
  readonly element: HTMLElement;
  readonly #text = el("div", { class: "question-text", dir: "auto" });
  readonly #files = el("div", { class: "files" });
  readonly #tools = el("div", { class: "tools" });
  #state: MessageState | undefined;

  constructor(private readonly actions: MessageActions) {
    const bubble = el("div", { class: "bubble" }, this.#files, this.#text);
    this.element = el("article", { class: "question", "aria-label": "You" }, bubble, this.#tools);
  }

  sync(state: MessageState): void {
    this.#state = state;
    const { message } = state;
    if (this.#text.textContent !== message.content) this.#text.textContent = message.content;
    this.#text.hidden = message.content === "";
    this.#showFiles(message);
    this.#tools.replaceChildren(
      ...[
        versionButtons(state, this.actions),
        iconButton("edit", "Edit the question", () => this.edit(), { disabled: state.isBusy }),
        copyButton("Copy the question", () => message.content),
      ].filter((each) => each !== null),
    );
  }

  #showFiles(message: Message): void {
    // one that was opened stays open: files of a question are never others
    if (this.#files.childElementCount === (message.files ?? []).length) return;
    this.#files.replaceChildren(
      ...(message.files ?? []).map((file) =>
        el(
          "details",
          { class: "file" },
          el(
            "summary",
            {},
            icon("file"),
            file.name,
            el("small", {}, wording.bytes(new Blob([file.text]).size)),
          ),
          el("pre", { dir: "auto", tabindex: 0 }, file.text),
        ),
      ),
    );
  }

  edit(): void {
    const state = this.#state;
    if (!state || state.isBusy || this.element.querySelector("form")) return;
    const area = el("textarea", { "aria-label": "Edit the question", rows: 3, dir: "auto" });
    area.value = state.message.content;
    const close = () => {
      form.replaceWith(this.#text);
      (
        this.#tools.querySelector("[aria-label='Edit the question']") as HTMLElement | null
      )?.focus();
    };
    const submit = () => {
      close();
      if (area.value.trim() !== "") this.actions.edit(state.message, area.value);
    };
    const form = el(
      "form",
      {
        class: "edit",
        onsubmit: (event: Event) => {
          event.preventDefault();
          submit();
        },
        onkeydown: (event: KeyboardEvent) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            submit();
          }
        },
      },
      area,
      el(
        "div",
        { class: "row" },
        el("button", { type: "submit", class: "primary" }, "Ask again"),
        el("button", { type: "button", onclick: close }, "Cancel"),
        el("small", {}, "What was said before is kept as another version."),
      ),
    );
    this.#text.replaceWith(form);
    area.focus();
  }
}

export class AnswerView {
  readonly element: HTMLElement;
  readonly #name = el("h2", { class: "name" });
  readonly #body = el("div", { class: "markdown" });
  readonly #thoughts = el("div", { class: "markdown" });
  readonly #thinkingTitle = el("summary", {});
  readonly #thinking = el("details", { class: "thinking" }, this.#thinkingTitle, this.#thoughts);
  readonly #waiting = el("p", { class: "waiting" });
  readonly #tools = el("div", { class: "tools" });
  readonly #facts = el("span", { class: "facts" });
  readonly #markdown = new LiveMarkdown(this.#body);
  readonly #thinkingMarkdown = new LiveMarkdown(this.#thoughts);
  #state: MessageState | undefined;
  /** a frame that is dearer than this one may not come before it */
  #notBefore = 0;
  #rateAt = 0;

  constructor(private readonly actions: MessageActions) {
    this.element = el(
      "article",
      { class: "answer" },
      this.#name,
      this.#body,
      this.#waiting,
      el("footer", {}, this.#tools, this.#facts),
    );
  }

  sync(state: MessageState): void {
    this.#state = state;
    const { message, answering } = state;
    this.#name.textContent = state.name;
    this.element.setAttribute("aria-label", state.name);
    this.element.setAttribute("aria-busy", String(answering !== undefined));
    this.element.classList.toggle("is-running", answering !== undefined);
    const isCut = Boolean(message.partial) && !answering && !state.isElsewhere;
    this.element.classList.toggle("is-partial", isCut);
    if (answering) {
      this.#showWaiting(answering);
      this.#tools.replaceChildren();
      this.#facts.textContent = "";
      return;
    }
    this.#waiting.hidden = true;
    this.#write(message.content, true);
    const canGoOn = state.isLast && !state.isElsewhere;
    this.#tools.replaceChildren(
      ...[
        versionButtons(state, this.actions),
        copyButton("Copy the answer", () => thoughtsOf(message.content).answer),
        canGoOn &&
          iconButton("redo", "Answer again", () => this.actions.regenerate(message), {
            disabled: state.isBusy,
          }),
        canGoOn &&
          iconButton("play", "Continue the answer", () => this.actions.continue(message), {
            disabled: state.isBusy,
          }),
      ].filter((each) => each instanceof HTMLElement),
    );
    this.#facts.textContent = state.isElsewhere
      ? "being written in another tab"
      : wording.facts(message, state.isNameHidden).join(" · ");
    this.#facts.classList.toggle("is-bad", Boolean(message.error));
  }

  /** Draw what has come, unless drawing took so long lately that it is not its turn yet. */
  draw(now: number): boolean {
    const state = this.#state;
    if (!state?.answering) return true;
    if (now < this.#notBefore) return false;
    const start = performance.now();
    this.#waiting.hidden = state.answering.hasBegun;
    this.#write(state.message.content, false);
    if (now - this.#rateAt > 500) {
      this.#rateAt = now;
      const { rate } = state.answering;
      this.#facts.textContent =
        rate > 0 && !state.isNameHidden ? `${rate.toFixed(0)} tokens/s` : "";
    }
    const took = performance.now() - start;
    // a third of the time at most, however long the last block has grown
    this.#notBefore = took > 4 ? performance.now() + 2 * took : 0;
    return true;
  }

  #write(text: string, isWhole: boolean): void {
    const { thinking, answer } = thoughtsOf(text);
    if (!thinking) this.#thinking.remove();
    else {
      if (!this.#thinking.isConnected) this.#body.before(this.#thinking);
      this.#thinkingTitle.textContent = answer || isWhole ? "What it thought first" : "Thinking …";
      if (isWhole) this.#thinkingMarkdown.finish(thinking);
      else this.#thinkingMarkdown.update(thinking);
    }
    if (isWhole) this.#markdown.finish(answer);
    else this.#markdown.update(answer);
  }

  takeNews(): string {
    return this.#markdown.takeNews();
  }

  #showWaiting(answering: Answering): void {
    const { place, loadedBytes, totalBytes } = answering.waiting;
    this.#waiting.hidden = answering.hasBegun;
    let text = "Waiting for the first word";
    if (place !== undefined) text = `Waiting: ${wording.place(place)}`;
    if (totalBytes) text = `The model is ${wording.loading(loadedBytes, totalBytes)}`;
    this.#waiting.replaceChildren(el("span", { class: "dots", "aria-hidden": "true" }), text);
  }
}
