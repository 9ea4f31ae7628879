import { expect, test } from "vitest";
import { thoughtsOf } from "../src/thinking";

test.each([
  ["Hello", undefined, "Hello"],
  ["<thing> x", undefined, "<thing> x"],
  ["I <think> so", undefined, "I <think> so"],
  ["<thi", undefined, ""],
  ["<think>\nHm, a < b </th", "Hm, a < b ", ""],
  ["\n<think>\nHm.\n</think>\n\nYes.", "Hm.\n", "Yes."],
  ["<think></think>Yes.", "", "Yes."],
])("%j", (text, thinking, answer) => {
  expect(thoughtsOf(text)).toEqual({ thinking, answer });
});

test("piece by piece both parts only grow", () => {
  const text = "<think>\nOne <two> three.\n</think>\n\nFour < five.";
  let before = thoughtsOf("");
  for (let end = 1; end <= text.length; end++) {
    const now = thoughtsOf(text.slice(0, end));
    expect(now.answer.startsWith(before.answer)).toBe(true);
    if (now.answer === "")
      expect((now.thinking ?? "").startsWith(before.thinking ?? "")).toBe(true);
    before = now;
  }
});
