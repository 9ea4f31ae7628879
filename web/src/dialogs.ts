/** Dialogs: the key, the settings, the shortcuts. Each is made when it is opened. */

import { el, iconButton } from "./dom";
import { isKey } from "./key";
import type { Preferences } from "./preferences";

function open(
  title: string,
  name: string,
  ...content: (Node | string | null)[]
): HTMLDialogElement {
  const opener = document.activeElement;
  const dialog = el(
    "dialog",
    { class: `dialog ${name}`, "aria-labelledby": `${name}-title` },
    el(
      "div",
      { class: "panel-head" },
      el("h2", { id: `${name}-title` }, title),
      iconButton("close", "Close", () => dialog.close()),
    ),
    ...content,
  );
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (opener instanceof HTMLElement && opener.isConnected) opener.focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    // Esc closes the dialog and stops no answer
    if (event.key === "Escape") event.stopPropagation();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Resolves with what was typed, or null. */
export function askKey(reason: string): Promise<{ key: string; isRemembered: boolean } | null> {
  return new Promise((resolve) => {
    const input = el("input", {
      type: "password",
      id: "key",
      autocomplete: "off",
      required: true,
      "aria-describedby": "key-reason",
      oninput: () =>
        input.setCustomValidity(
          isKey(input.value) ? "" : "A key has no spaces and no letters beyond ASCII",
        ),
    });
    const remember = el("input", { type: "checkbox", id: "remember" });
    let answer: { key: string; isRemembered: boolean } | null = null;
    const form = el(
      "form",
      {
        method: "dialog",
        onsubmit: () => {
          answer = { key: input.value, isRemembered: remember.checked };
        },
      },
      el("p", { id: "key-reason" }, reason),
      el("div", { class: "field wide" }, el("label", { for: "key" }, "API key"), input),
      el("label", { class: "check", for: "remember" }, remember, "Remember it in this browser"),
      el("div", { class: "row" }, el("button", { type: "submit", class: "primary" }, "Log in")),
    );
    const dialog = open("This server asks for a key", "login", form);
    dialog.addEventListener("close", () => resolve(answer));
    input.focus();
  });
}

export interface SettingsActions {
  changed(preferences: Preferences): void;
  copyHere: (() => void) | null;
  logOut: (() => void) | null;
}

export function openSettings(
  preferences: Preferences,
  serverKeeps: boolean,
  actions: SettingsActions,
): void {
  const choice = <Name extends "theme" | "place">(
    name: Name,
    legend: string,
    options: [Preferences[Name], string][],
  ) =>
    el(
      "fieldset",
      {},
      el("legend", {}, legend),
      ...options.map(([value, label]) =>
        el(
          "label",
          { class: "check" },
          el("input", {
            type: "radio",
            name,
            value,
            checked: preferences[name] === value,
            disabled: value === "server" && !serverKeeps,
            onchange: () => {
              preferences = { ...preferences, [name]: value };
              actions.changed(preferences);
            },
          }),
          label,
        ),
      ),
    );
  const { copyHere, logOut } = actions;
  const dialog = open(
    "Settings",
    "settings",
    choice("theme", "Colours", [
      ["system", "As the system has them"],
      ["light", "Light"],
      ["dark", "Dark"],
    ]),
    choice("place", "Chats are kept", [
      [
        "server",
        serverKeeps
          ? "on the server, apart for each API key"
          : "on the server (this one keeps none)",
      ],
      ["browser", "only in this browser"],
    ]),
    el(
      "div",
      { class: "row" },
      copyHere &&
        el("button", { type: "button", onclick: copyHere }, "Copy chats from the other place"),
      el("button", { type: "button", onclick: () => openShortcuts() }, "Shortcuts"),
      logOut &&
        el(
          "button",
          {
            type: "button",
            onclick: () => {
              dialog.close();
              logOut();
            },
          },
          "Log out",
        ),
    ),
  );
}

const SHORTCUTS: [string, string][] = [
  ["Enter", "Send the question"],
  ["Shift+Enter", "A new line"],
  ["Esc", "Stop the answer, or take back what waits to be sent"],
  ["↑ in an empty question", "Edit the last question"],
  ["/", "Write a question"],
  ["Ctrl+Shift+O", "New chat"],
  ["Ctrl+K", "Search chats"],
  ["Alt+↑, Alt+↓", "Chat before, chat after"],
  ["Alt+R", "Answer again"],
  ["Alt+C", "Copy the last answer"],
  ["Alt+S", "Sampling"],
  ["Alt+B", "List of chats"],
  ["?", "These shortcuts"],
];

export function openShortcuts(): void {
  if (document.querySelector("dialog.shortcuts")) return;
  open(
    "Shortcuts",
    "shortcuts",
    el(
      "table",
      {},
      el(
        "tbody",
        {},
        ...SHORTCUTS.map(([keys, what]) =>
          el("tr", {}, el("td", {}, ...keyCaps(keys)), el("td", {}, what)),
        ),
      ),
    ),
  );
}

function keyCaps(keys: string): (Node | string)[] {
  return keys
    .split(/(\+|, | in an empty question)/)
    .map((part) => (/^(\+|, | in )/.test(part) ? part : el("kbd", {}, part)));
}
