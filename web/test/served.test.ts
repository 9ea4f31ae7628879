import { expect, test } from "vitest";
import type { Model } from "../src/api";
import { look, progress, served } from "../src/served";

const A: Model = { name: "a", state: "ready", contextLength: 8, isForChat: true };
const B: Model = { name: "b", state: "loading", loadedBytes: 1, totalBytes: 9, isForChat: true };
const EMBEDS: Model = { name: "e", state: "ready", isForChat: false };

test("of those wanted the ones that are there, else the first that chats", () => {
  expect(served([A, B], ["b", "gone"])).toEqual(["b"]);
  expect(served([EMBEDS, A], ["gone"])).toEqual(["a"]);
  expect(served([EMBEDS], ["gone"])).toEqual(["gone"]);
  expect(served([], [])).toEqual([""]);
});

test.each([{ name: "c" }, { state: "failed" }, { contextLength: 9 }, { isForChat: false }])(
  "%o is another look",
  (change) => {
    expect(look([{ ...A, ...change }])).not.toBe(look([A]));
  },
);

test("how far a load is changes nothing but that", () => {
  const further = { ...B, loadedBytes: 2 };
  expect(look([A, further])).toBe(look([A, B]));
  expect(progress([A, further])).not.toBe(progress([A, B]));
  expect(progress([A, { ...B }])).toBe(progress([A, B]));
});
