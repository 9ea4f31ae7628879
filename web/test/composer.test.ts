import { beforeEach, expect, test, vi } from "vitest";
import { Composer } from "../src/composer";
import type { Written } from "../src/drafts";

const HOLD = "a model is there";

function made() {
  const actions = { send: vi.fn(), stop: vi.fn(), drafted: vi.fn(), editLast: vi.fn() };
  const composer = new Composer(actions);
  document.body.replaceChildren(composer.element);
  const area = composer.element.querySelector("textarea") as HTMLTextAreaElement;
  const type = (text: string) => {
    area.value = text;
    area.dispatchEvent(new Event("input"));
  };
  const enter = () =>
    area.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", cancelable: true }));
  const told = () => composer.element.querySelector("[role=status]")?.textContent;
  return { actions, composer, area, type, enter, told };
}

function file(name: string, text: string | Promise<string>): File {
  const content = Promise.resolve(text).then((each) => new TextEncoder().encode(each).buffer);
  return { name, size: 1, arrayBuffer: () => content } as unknown as File;
}

beforeEach(() => {
  vi.stubGlobal("matchMedia", () => ({ matches: false }));
});

test("what is sent before anybody can answer goes out by itself, once", () => {
  const { actions, composer, area, type, enter, told } = made();
  composer.setHold(HOLD);
  type("early?");
  enter();
  enter();
  expect(actions.send).not.toHaveBeenCalled();
  expect(told()).toContain(HOLD);
  expect(composer.element.querySelector("[type=submit]")?.getAttribute("aria-label")).toBe(
    "Waiting to be sent",
  );
  composer.setHold(HOLD);
  expect(actions.send).not.toHaveBeenCalled();
  composer.setHold(null);
  composer.setHold(null);
  expect(actions.send.mock.calls).toEqual([["early?", []]]);
  expect([area.value, told()]).toEqual(["", ""]);
});

test.each(["Esc", "a change", "a file", "another chat"])("%s takes it back", async (how) => {
  const { actions, composer, area, type, enter, told } = made();
  composer.setHold(HOLD);
  type("early?");
  enter();
  if (how === "Esc") composer.takeBack();
  else if (how === "a change") type("early");
  else if (how === "a file") await composer.attach([file("a.txt", "a")]);
  else composer.show({ text: "a draft", files: [] });
  expect(told()).toBe("");
  composer.setHold(null);
  expect(actions.send).not.toHaveBeenCalled();
  expect(area.value).not.toBe("");
});

test("nothing waits where nothing is written", () => {
  const { actions, composer, enter, told } = made();
  composer.setHold(HOLD);
  enter();
  expect(told()).toBe("");
  composer.setHold(null);
  expect(actions.send).not.toHaveBeenCalled();
});

test("a file that is read after another chat was opened stays with its own", async () => {
  const { actions, composer } = made();
  let read: (text: string) => void = () => undefined;
  const attached = composer.attach([file("a.txt", new Promise((resolve) => (read = resolve)))]);
  const [mine] = actions.drafted.mock.lastCall as [Written];
  composer.show({ text: "", files: [] });
  read("a");
  await attached;
  expect(mine.files).toEqual([{ name: "a.txt", text: "a" }]);
  expect(composer.isEmpty).toBe(true);
});
