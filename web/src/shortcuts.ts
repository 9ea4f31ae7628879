/** Keys that work everywhere on the page. dialogs.ts shows them, docs/guide/web.md lists them. */

import type { App } from "./app";

export function listenForShortcuts(app: App): void {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    if (document.querySelector("dialog[open]")) return;
    const run = actionOf(event, app);
    if (!run) return;
    event.preventDefault();
    run();
  });
}

function actionOf(event: KeyboardEvent, app: App): (() => void) | undefined {
  const { key, code, altKey, shiftKey } = event;
  const isCommand = event.ctrlKey || event.metaKey;
  if (key === "Escape" && (app.isBusy || app.isWaiting)) return () => app.stop();
  if (isCommand && shiftKey && code === "KeyO") return () => app.fresh();
  if (isCommand && !shiftKey && !altKey && code === "KeyK") return () => app.search();
  if (altKey && !isCommand && !shiftKey) {
    // a Mac writes ß and ç by Option
    if (isWriting(event.target) && isOtherLetter(key, code)) return undefined;
    // by place, as Alt makes other letters of them on some keyboards
    switch (code) {
      case "ArrowUp":
        return () => app.neighbour(-1);
      case "ArrowDown":
        return () => app.neighbour(1);
      case "KeyR":
        return () => app.regenerateLast();
      case "KeyC":
        return () => void app.copyLast();
      case "KeyS":
        return () => app.togglePanel();
      case "KeyB":
        return () => app.toggleSidebar();
    }
    return undefined;
  }
  if (isCommand || altKey || isWriting(event.target)) return undefined;
  if (key === "/") return () => app.writeQuestion();
  if (key === "?") return () => app.shortcuts();
  return undefined;
}

function isOtherLetter(key: string, code: string): boolean {
  return [...key].length === 1 && `Key${key.toUpperCase()}` !== code;
}

function isWriting(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.matches("input, textarea, select");
}
