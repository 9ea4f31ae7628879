/** Where questions are written: text, files, send and stop. Knows no conversation. */

import type { TextFile } from "./conversation";
import { el, icon, iconButton } from "./dom";
import type { Written } from "./drafts";
import * as wording from "./wording";

const MAX_FILE_BYTES = 256 * 1024;
const MAX_ALL_BYTES = 1024 * 1024;

export interface ComposerActions {
  send(text: string, files: TextFile[]): void;
  stop(): void;
  drafted(written: Written): void;
  /** ArrowUp where nothing is written */
  editLast(): void;
}

export class Composer {
  readonly element: HTMLElement;
  readonly #area: HTMLTextAreaElement;
  readonly #send: HTMLButtonElement;
  readonly #stop: HTMLButtonElement;
  readonly #chips = el("ul", { class: "chips", "aria-label": "Attached files" });
  readonly #note = el("p", { class: "note", role: "alert" });
  readonly #context = el("div", { class: "context" });
  readonly #wish = el("p", { class: "wish", role: "status" });
  readonly #picker: HTMLInputElement;
  #files: TextFile[] = [];
  #isBusy = false;
  /** what a question has to wait for; null: nothing */
  #hold: string | null = null;
  /** it was sent, and goes out by itself as soon as it can */
  #isWished = false;

  constructor(private readonly actions: ComposerActions) {
    this.#area = el("textarea", {
      rows: 1,
      id: "question",
      dir: "auto",
      placeholder: "Ask something",
      "aria-label": "Your question",
      enterkeyhint: "send",
      oninput: () => {
        this.#fit();
        this.#changed();
      },
      onkeydown: (event: KeyboardEvent) => this.#key(event),
    });
    this.#picker = el("input", {
      type: "file",
      multiple: true,
      hidden: true,
      "aria-label": "Files to attach",
      onchange: () => {
        void this.attach([...(this.#picker.files ?? [])]);
        this.#picker.value = "";
      },
    });
    this.#send = el(
      "button",
      { type: "submit", class: "send", "aria-label": "Send", title: "Send (Enter)" },
      icon("send"),
    );
    this.#stop = el(
      "button",
      {
        type: "button",
        class: "send stop",
        "aria-label": "Stop",
        title: "Stop (Esc)",
        onclick: () => actions.stop(),
      },
      icon("stop"),
    );
    const attach = iconButton(
      "clip",
      `Attach text files, up to ${wording.bytes(MAX_FILE_BYTES)} each`,
      () => this.#picker.click(),
    );
    const form = el(
      "form",
      {
        class: "composer",
        onsubmit: (event: Event) => {
          event.preventDefault();
          this.#submit();
        },
      },
      this.#chips,
      el(
        "div",
        { class: "composer-row" },
        attach,
        this.#picker,
        this.#area,
        this.#send,
        this.#stop,
      ),
    );
    this.element = el(
      "div",
      { class: "composer-frame" },
      this.#note,
      this.#wish,
      form,
      this.#context,
    );
    for (const type of ["dragover", "drop"]) {
      form.addEventListener(type, (event) => {
        const files = (event as DragEvent).dataTransfer?.files;
        if (!(event as DragEvent).dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        if (type === "drop" && files) void this.attach([...files]);
      });
    }
    this.setBusy(false);
  }

  get isEmpty(): boolean {
    return this.#area.value === "" && this.#files.length === 0;
  }

  focus(): void {
    this.#area.focus();
  }

  /** Show another draft. What was to be sent of the one before is not. */
  show({ text, files }: Written): void {
    this.takeBack();
    this.#area.value = text;
    this.#files = files;
    this.#note.textContent = "";
    this.#showFiles();
    this.#fit();
  }

  /** Write something else in the place of what is there. */
  write(text: string): void {
    this.show({ text, files: [] });
    this.#changed();
  }

  setBusy(isBusy: boolean): void {
    this.#isBusy = isBusy;
    this.#send.hidden = isBusy;
    this.#stop.hidden = !isBusy;
  }

  /** What a question has to wait for before it is sent; null: nothing any more. */
  setHold(hold: string | null): void {
    this.#hold = hold;
    if (hold === null && this.#isWished) this.#submit();
    else this.#showWish();
  }

  get isWished(): boolean {
    return this.#isWished;
  }

  /** What waits to be sent stays to be written. */
  takeBack(): void {
    this.#isWished = false;
    this.#showWish();
  }

  /** How much of the context is used; undefined where nobody knows. */
  setContext(used: number | undefined, length: number | undefined): void {
    if (used === undefined || length === undefined) {
      this.#context.replaceChildren();
      return;
    }
    const share = Math.min(1, used / length);
    const label = `Context: ${wording.number(used)} of ${wording.number(length)} tokens`;
    this.#context.replaceChildren(
      el("meter", {
        min: 0,
        max: 1,
        value: share,
        high: 0.8,
        low: 0.8,
        optimum: 0,
        "aria-label": label,
      }),
      el("span", { "aria-hidden": "true" }, label),
    );
  }

  async attach(files: File[]): Promise<void> {
    const refused: string[] = [];
    // whose they are: another chat may be shown before they are read
    const mine = this.#files;
    this.#changed();
    for (const file of files) {
      const all = mine.reduce((sum, each) => sum + each.text.length, file.size);
      if (file.size > MAX_FILE_BYTES || all > MAX_ALL_BYTES) {
        const limit = file.size > MAX_FILE_BYTES ? MAX_FILE_BYTES : MAX_ALL_BYTES;
        refused.push(
          `${file.name} is too big (${wording.bytes(file.size)}, the limit is ${wording.bytes(limit)})`,
        );
        continue;
      }
      try {
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new Error("not a text");
        mine.push({ name: file.name, text });
      } catch {
        refused.push(`${file.name} is no text in UTF-8`);
      }
    }
    if (mine !== this.#files) return;
    this.#note.textContent = refused.join("; ");
    this.#showFiles();
    this.focus();
  }

  #showFiles(): void {
    this.#chips.hidden = this.#files.length === 0;
    this.#chips.replaceChildren(
      ...this.#files.map((file) =>
        el(
          "li",
          {},
          icon("file"),
          file.name,
          iconButton("close", `Leave out ${file.name}`, () => {
            this.#files = this.#files.filter((each) => each !== file);
            this.#changed();
            this.#showFiles();
            this.focus();
          }),
        ),
      ),
    );
  }

  #submit(): void {
    const text = this.#area.value.trim();
    if (this.#isBusy || (text === "" && this.#files.length === 0)) return;
    if (this.#hold !== null) {
      this.#isWished = true;
      this.#showWish();
      return;
    }
    const files = this.#files;
    this.write("");
    this.actions.send(text, files);
  }

  #changed(): void {
    this.takeBack();
    this.actions.drafted({ text: this.#area.value, files: this.#files });
  }

  #showWish(): void {
    const isWaiting = this.#isWished && this.#hold !== null;
    const text = isWaiting
      ? `It is sent as soon as ${this.#hold}. Esc, or a change, takes it back.`
      : "";
    if (this.#wish.textContent !== text) this.#wish.textContent = text;
    this.#send.classList.toggle("is-waiting", isWaiting);
    this.#send.setAttribute("aria-label", isWaiting ? "Waiting to be sent" : "Send");
    this.#send.title = isWaiting ? "Waiting to be sent (Esc)" : "Send (Enter)";
  }

  #key(event: KeyboardEvent): void {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      // a keyboard of glass has no other key for a new line
      if (matchMedia("(pointer: coarse)").matches) return;
      event.preventDefault();
      this.#submit();
    } else if (event.key === "ArrowUp" && this.isEmpty) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  #fit(): void {
    const area = this.#area;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, window.innerHeight * 0.4)}px`;
  }
}
