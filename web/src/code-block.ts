/** A block of code: its language, a copy button, and colours when they have come. */

import { copyButton, el } from "./dom";
import { highlight } from "./highlight";

export function codeBlock(language: string, code: string): HTMLElement {
  const text = code.replace(/\n$/, "");
  const body = el("code", { dir: "ltr" }, text);
  const block = codeFrame(language, body);
  void highlight(body, language, text);
  return block;
}

/** The same around an element whose text is still growing. */
export function codeFrame(language: string, body: HTMLElement): HTMLElement {
  return el(
    "figure",
    { class: "code", dir: "ltr" },
    el(
      "figcaption",
      {},
      el("span", { class: "code-language" }, language || "text"),
      copyButton("Copy code", () => body.textContent ?? ""),
    ),
    el("pre", { tabindex: 0, role: "region", "aria-label": `Code, ${language || "text"}` }, body),
  );
}
