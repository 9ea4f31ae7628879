import { expect, test } from "vitest";
import { readDraft, writeDraft } from "../src/preferences";

test("a draft that is too long does not erase the one before", () => {
  writeDraft("a", "before");
  writeDraft("a", "x".repeat(200_001));
  expect(readDraft("a")).toBe("before");
  writeDraft("a", "");
  expect(readDraft("a")).toBe("");
});
