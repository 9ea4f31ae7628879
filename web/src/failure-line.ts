/** What went wrong with a question, in one line, and what can be done. */

import { ApiError } from "./api";
import { el } from "./dom";
import * as wording from "./wording";

export interface FailureActions {
  again(): void;
  edit(): void;
  /** Answer it without the oldest turns. */
  shorten(): void;
  askElsewhere(): void;
}

/** `failure` undefined: nobody knows why there is no answer; the page was left, for one. */
export function failureLine(failure: ApiError | undefined, actions: FailureActions): HTMLElement {
  const error = failure ?? new ApiError("This question has no answer yet", "unanswered", 200);
  const isTooLong = error.code === "context_length_exceeded";
  const button = (label: string, run: () => void, isPrimary = false) =>
    el("button", { type: "button", class: isPrimary ? "primary" : undefined, onclick: run }, label);
  return el(
    "div",
    { class: "failure", role: "alert" },
    el("p", { dir: "auto" }, `${sentence(error.message)} ${wording.advice(error)}`),
    el(
      "div",
      { class: "row" },
      isTooLong && button("Leave out the oldest turns", actions.shorten, true),
      isTooLong && button("New chat with this question", actions.askElsewhere),
      button(failure ? "Try again" : "Answer it", actions.again, !isTooLong),
      failure && button("Edit", actions.edit),
    ),
  );
}

function sentence(text: string): string {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}
