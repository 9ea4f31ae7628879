/** What stands where nothing has been said yet. */

import type { Model } from "./api";
import { el } from "./dom";

export function welcome(wanted: string[], served: Model[]): HTMLElement {
  const name = wanted.filter((each) => each !== "").join(" and ");
  const isAnyThere = name !== "" || served.some((model) => model.isForChat);
  return el(
    "div",
    { class: "welcome" },
    el("p", { class: "welcome-title" }, name ? `Chat with ${name}` : "No model is served yet"),
    el(
      "p",
      {},
      isAnyThere
        ? "What you write goes to this server alone."
        : "The server has started, its models are on their way.",
    ),
  );
}
