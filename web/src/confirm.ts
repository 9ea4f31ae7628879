/** A question that has to be agreed to. Esc, or a click beside it, is a no. */

import { el } from "./dom";

export function confirmed(question: string, label: string): Promise<boolean> {
  return new Promise((resolve) => {
    const opener = document.activeElement;
    const dialog = el(
      "dialog",
      { class: "dialog confirm", "aria-labelledby": "confirm-question" },
      el("p", { id: "confirm-question", dir: "auto" }, question),
      el(
        "form",
        { method: "dialog", class: "row" },
        el("button", { type: "submit", value: "yes", class: "dangerous" }, label),
        el("button", { type: "submit", value: "no", autofocus: true }, "Cancel"),
      ),
    );
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (opener instanceof HTMLElement && opener.isConnected) opener.focus();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
