/** How answers are drawn: what is left empty is the server's to say. */

import { CHAT_TEMPERATURE, type Conversation, type Sampling } from "./conversation";
import { el, iconButton } from "./dom";

type NumberName = "temperature" | "top_p" | "top_k" | "max_tokens" | "seed";

const NUMBERS: {
  name: NumberName;
  label: string;
  hint: string;
  min: number;
  max?: number;
  step: number | "any";
}[] = [
  {
    name: "temperature",
    label: "Temperature",
    hint: "0 is always the likeliest word",
    min: 0,
    max: 2,
    step: "any",
  },
  {
    name: "top_p",
    label: "Top p",
    hint: "the likeliest words up to this share",
    min: 0,
    max: 1,
    step: "any",
  },
  { name: "top_k", label: "Top k", hint: "only this many words", min: -1, step: 1 },
  { name: "max_tokens", label: "Max tokens", hint: "the longest answer", min: 1, step: 1 },
  {
    name: "seed",
    label: "Seed",
    hint: "the same number, the same answer",
    min: Number.MIN_SAFE_INTEGER,
    step: 1,
  },
];

export class SamplingPanel {
  readonly element: HTMLElement;
  readonly #system: HTMLTextAreaElement;
  readonly #stop: HTMLTextAreaElement;
  readonly #rolling: HTMLInputElement;
  readonly #inputs = new Map<NumberName, HTMLInputElement>();
  /** whose settings are shown */
  #id = "";

  constructor(
    private readonly onChange: (system: string, sampling: Sampling) => void,
    onClose: () => void,
  ) {
    const changed = () => this.#changed();
    this.#system = el("textarea", { id: "system", rows: 4, dir: "auto", oninput: changed });
    this.#stop = el("textarea", {
      id: "stop",
      rows: 2,
      dir: "auto",
      "aria-describedby": "stop-hint",
      oninput: changed,
    });
    this.#rolling = el("input", { type: "checkbox", id: "rolling", onchange: changed });
    const fields = NUMBERS.map(({ name, label, hint, min, max, step }) => {
      const input = el("input", {
        type: "number",
        id: name,
        placeholder: name === "temperature" ? `${CHAT_TEMPERATURE}` : "server default",
        inputmode: step === 1 ? "numeric" : "decimal",
        "aria-describedby": `${name}-hint`,
        min,
        max,
        step,
        oninput: changed,
      });
      this.#inputs.set(name, input);
      return el(
        "div",
        { class: "field" },
        el("label", { for: name }, label),
        input,
        el("small", { id: `${name}-hint` }, hint),
      );
    });
    this.element = el(
      "aside",
      { class: "panel", id: "sampling", "aria-label": "Sampling", hidden: true },
      el(
        "div",
        { class: "panel-head" },
        el("h2", {}, "Sampling"),
        iconButton("close", "Close the panel", onClose),
      ),
      el(
        "div",
        { class: "field wide" },
        el("label", { for: "system" }, "System message"),
        this.#system,
      ),
      ...fields,
      el(
        "div",
        { class: "field wide" },
        el("label", { for: "stop" }, "Stop texts"),
        this.#stop,
        el("small", { id: "stop-hint" }, "one a line; the answer ends before any of them"),
      ),
      el(
        "label",
        { class: "check", for: "rolling" },
        this.#rolling,
        "Leave out the oldest turns when the context is full",
      ),
      el(
        "button",
        {
          type: "button",
          onclick: () => {
            this.#fill("", {});
            this.#changed();
          },
        },
        "All to the defaults",
      ),
    );
  }

  show(conversation: Conversation): void {
    // whoever writes here is not interrupted, unless it is another chat
    const isSame = conversation.id === this.#id;
    if (isSame && this.element.contains(document.activeElement)) return;
    this.#id = conversation.id;
    this.#fill(conversation.system, conversation.sampling);
  }

  #fill(system: string, sampling: Sampling): void {
    this.#system.value = system;
    this.#stop.value = (sampling.stop ?? []).join("\n");
    this.#rolling.checked = sampling.truncation === "rolling";
    for (const [name, input] of this.#inputs) input.value = String(sampling[name] ?? "");
  }

  #changed(): void {
    const sampling: Sampling = {};
    for (const [name, input] of this.#inputs) {
      const isWrong = !input.checkValidity();
      input.setAttribute("aria-invalid", String(isWrong));
      if (!isWrong && input.value !== "") sampling[name] = input.valueAsNumber;
    }
    const stop = this.#stop.value.split("\n").filter((line) => line !== "");
    if (stop.length > 0) sampling.stop = stop;
    if (this.#rolling.checked) sampling.truncation = "rolling";
    this.onChange(this.#system.value, sampling);
  }
}
