/** Which model answers, or which two beside each other, and how far they are. */

import type { Model } from "./api";
import type { Conversation } from "./conversation";
import { el, icon } from "./dom";
import { areNamesHidden, sideName } from "./side-by-side";
import * as wording from "./wording";

export class ModelPicker {
  readonly element = el("div", { class: "picker" });
  readonly #selects = [this.#select(0), this.#select(1)];
  readonly #beside: HTMLButtonElement;
  readonly #blind: HTMLInputElement;
  readonly #blindLabel: HTMLElement;
  readonly #state = el("span", { class: "model-state", role: "status" });
  #models: Model[] = [];
  #shown: Conversation | undefined;
  #isBusy = false;

  constructor(private readonly onPick: (models: string[], isBlind: boolean) => void) {
    this.#beside = el(
      "button",
      {
        type: "button",
        class: "icon-button",
        title: "Two models side by side",
        "aria-label": "Two models side by side",
        "aria-pressed": "false",
        onclick: () => this.#toggle(),
      },
      icon("columns"),
    );
    this.#blind = el("input", { type: "checkbox", id: "blind", onchange: () => this.#pick() });
    this.#blindLabel = el("label", { class: "check", for: "blind" }, this.#blind, "Hide the names");
    const [left, right] = this.#selects;
    this.element.append(
      ...[left, right].filter((each) => each !== undefined),
      this.#beside,
      this.#blindLabel,
      this.#state,
    );
  }

  setModels(models: Model[]): void {
    this.#models = models.filter((model) => model.isForChat);
    if (this.#shown) this.show(this.#shown, this.#isBusy);
  }

  show(conversation: Conversation, isBusy: boolean): void {
    this.#shown = conversation;
    this.#isBusy = isBusy;
    const isTwo = conversation.models.length > 1;
    // once something was said to two models that are hidden, they stay who they are
    const isHidden = isTwo && areNamesHidden(conversation) && conversation.messages.length > 0;
    this.#selects.forEach((select, side) => {
      select.hidden = side === 1 && !isTwo;
      select.disabled = isBusy || isHidden;
      this.#fill(select, side, conversation.models[side] ?? "", isHidden);
    });
    this.#beside.setAttribute("aria-pressed", String(isTwo));
    this.#beside.disabled = isBusy || this.#models.length === 0;
    this.#blindLabel.hidden = !isTwo || conversation.messages.length > 0;
    this.#blind.checked = Boolean(conversation.is_blind);
    const waiting = conversation.models
      .map((name) => this.#models.find((model) => model.name === name))
      .filter((model) => model && model.state !== "ready");
    this.#state.textContent = waiting.map((model) => (model ? stateText(model) : "")).join(", ");
  }

  #select(side: number): HTMLSelectElement {
    return el("select", {
      "aria-label": side === 0 ? "Model" : "Second model",
      onchange: () => this.#pick(),
    });
  }

  #fill(select: HTMLSelectElement, side: number, chosen: string, isHidden: boolean): void {
    const names = this.#models.map((model) => model.name);
    if (!names.includes(chosen) && chosen !== "") names.unshift(chosen);
    const options = isHidden
      ? [el("option", { value: chosen }, sideName(side))]
      : names.map((name) => {
          const model = this.#models.find((each) => each.name === name);
          const state = !model
            ? this.#models.length > 0
              ? " (not served)"
              : ""
            : model.state === "ready"
              ? ""
              : ` (${stateText(model)})`;
          return el("option", { value: name }, name + state);
        });
    const before = [...select.options].map((option) => option.value + option.text).join("\n");
    const after = options.map((option) => option.value + option.text).join("\n");
    if (before !== after) select.replaceChildren(...options);
    select.value = chosen;
  }

  #toggle(): void {
    const models = this.#shown?.models ?? [];
    const [first = this.#models[0]?.name ?? ""] = models;
    if (models.length > 1) this.onPick([first], false);
    else {
      const other = this.#models.find((model) => model.name !== first)?.name ?? first;
      this.onPick([first, other], this.#blind.checked);
    }
  }

  #pick(): void {
    const isTwo = (this.#shown?.models.length ?? 1) > 1;
    const models = this.#selects.slice(0, isTwo ? 2 : 1).map((select) => select.value);
    this.onPick(models, isTwo && this.#blind.checked);
  }
}

function stateText(model: Model): string {
  if (model.state === "loading") return wording.loading(model.loadedBytes, model.totalBytes);
  return model.state;
}
