import { expect, test } from "vitest";
import { ApiError } from "../src/api";
import type { Message } from "../src/conversation";
import * as wording from "../src/wording";

const ANSWER: Message = {
  id: "a",
  parent: null,
  role: "assistant",
  content: "x",
  created_at: 0,
  finish_reason: "length",
  usage: { prompt_tokens: 9, completion_tokens: 1234 },
  tokens_per_s: 41.25,
  ttft_s: 0.2,
};

test("what an answer took, in a line", () => {
  expect(wording.facts(ANSWER)).toEqual([
    "cut at its limit of tokens",
    "1,234 tokens",
    "41.3 tokens/s",
    "first after 0.20 s",
  ]);
});

test("speed does not tell a name that is hidden", () => {
  expect(wording.facts(ANSWER, true)).toEqual(["cut at its limit of tokens", "1,234 tokens"]);
});

test("an answer that is not whole is never called complete", () => {
  const { finish_reason: _, ...cut } = ANSWER;
  expect(wording.facts({ ...cut, partial: true })[0]).toBe("broke off");
  expect(wording.facts({ ...cut, partial: true, error: "no memory" })[0]).toBe(
    "broke off: no memory",
  );
  expect(wording.facts({ ...cut, partial: true, finish_reason: "stopped" })[0]).toBe(
    "stopped by you",
  );
});

test("what to do about an error", () => {
  const advice = (code: string, status: number, retryAfterS?: number) =>
    wording.advice(new ApiError("x", code, status, retryAfterS));
  expect(advice("context_length_exceeded", 400)).toContain("oldest turns");
  expect(advice("unreachable", 0)).toContain("kept");
  expect(advice("rate_limit_exceeded", 429, 7)).toBe("Try again in 7 s.");
  expect(advice("invalid_value", 400)).toBe("");
});

test("sizes, places and days", () => {
  expect([0, 999, 1500, 97_000_000, 14e9].map(wording.bytes)).toEqual([
    "0 B",
    "999 B",
    "1.5 kB",
    "97 MB",
    "14 GB",
  ]);
  expect(wording.loading(50, 200)).toBe("loading 25 % of 200 B");
  expect(wording.loading(undefined, 0)).toBe("loading");
  expect([wording.place(1), wording.place(3)]).toEqual([
    "next in the queue",
    "place 3 in the queue",
  ]);
  const noon = new Date(2026, 10, 23, 12);
  const ago = (hours: number) => wording.day(noon.getTime() / 1000 - hours * 3600, noon);
  expect([ago(1), ago(13), ago(49), ago(400)]).toEqual([
    "Today",
    "Yesterday",
    "This week",
    "Earlier",
  ]);
});
