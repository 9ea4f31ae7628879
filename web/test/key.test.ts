import { afterEach, expect, test } from "vitest";
import { forgetKey, keepKey, owned } from "../src/key";

afterEach(() => forgetKey());

test("what this browser keeps is apart for each key, and tells none", () => {
  expect(owned("chats")).toBe("chats");
  keepKey("first-key", false);
  const first = owned("chats");
  expect(first).toMatch(/^chats-[0-9a-f]{8}$/);
  keepKey("second-key", false);
  expect(owned("chats")).not.toBe(first);
  keepKey("first-key", true);
  expect(owned("chats")).toBe(first);
});
