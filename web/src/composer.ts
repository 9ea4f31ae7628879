/** Where questions are written: text, files, send and stop. Knows no conversation. */

import type { TextFile } from "./conversation";
import { el, icon, iconButton } from "./dom";
import * as wording from "./wording";

const MAX_FILE_BYTES = 256 * 1024;
const MAX_ALL_BYTES = 1024 * 1024;

export interface ComposerActions {
  send(text: string, files: TextFile[]): void;
  stop(): void;
  drafted(text: string): void;
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
  readonly #picker: HTMLInputElement;
  #files: TextFile[] = [];
  #isBusy = false;
  #canSend = true;

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
        this.actions.drafted(this.#area.value);
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
    this.element = el("div", { class: "composer-frame" }, this.#note, form, this.#context);
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

  /** Show another draft. */
  setText(text: string): void {
    this.#area.value = text;
    this.#files = [];
    this.#showFiles();
    this.#fit();
  }

  setBusy(isBusy: boolean): void {
    this.#isBusy = isBusy;
    this.#send.hidden = isBusy;
    this.#stop.hidden = !isBusy;
  }

  setCanSend(canSend: boolean): void {
    this.#canSend = canSend;
    this.#send.disabled = !canSend;
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
    for (const file of files) {
      const all = this.#files.reduce((sum, each) => sum + each.text.length, file.size);
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
        this.#files.push({ name: file.name, text });
      } catch {
        refused.push(`${file.name} is no text in UTF-8`);
      }
    }
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
            this.#showFiles();
            this.focus();
          }),
        ),
      ),
    );
  }

  #submit(): void {
    const text = this.#area.value.trim();
    if (this.#isBusy || !this.#canSend || (text === "" && this.#files.length === 0)) return;
    const files = this.#files;
    this.setText("");
    this.#note.textContent = "";
    this.actions.drafted("");
    this.actions.send(text, files);
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
