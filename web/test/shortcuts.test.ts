import { expect, test, vi } from "vitest";
import type { App } from "../src/app";
import { listenForShortcuts } from "../src/shortcuts";

const app = { togglePanel: vi.fn(), copyLast: vi.fn(), isBusy: false };
listenForShortcuts(app as unknown as App);

function press(target: HTMLElement, key: string, code: string): boolean {
  document.body.append(target);
  const event = new KeyboardEvent("keydown", {
    key,
    code,
    altKey: true,
    bubbles: true,
    cancelable: true,
  });
  return !target.dispatchEvent(event);
}

test("letters that Option writes on a Mac are written", () => {
  const area = document.createElement("textarea");
  expect(press(area, "ß", "KeyS")).toBe(false);
  expect(press(area, "ç", "KeyC")).toBe(false);
  expect(app.togglePanel).not.toHaveBeenCalled();
  // where Alt makes no other letter, and where nothing is written, they are shortcuts
  expect(press(area, "s", "KeyS")).toBe(true);
  expect(press(document.createElement("p"), "ß", "KeyS")).toBe(true);
  expect(app.togglePanel).toHaveBeenCalledTimes(2);
});
