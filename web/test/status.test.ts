import { describe, expect, it } from "vitest";
import { pointsOf } from "../src/status/sparkline";
import { statusOf } from "../src/status/status";
import { bytes, percent, rate, seconds, whole, word } from "../src/status/words";

describe("the status of a server", () => {
  it("has all its parts, whatever comes", () => {
    for (const given of [null, 3, [], {}, { workers: 7, models: {}, tokens_per_s: "x" }]) {
      const status = statusOf(given);
      expect(status.workers).toEqual([]);
      expect(status.tokens.history).toEqual([]);
    }
    const status = statusOf({
      workers: [null, { id: "a" }],
      tokens_per_s: { now: 3, step_s: 5, history: [1, "2", null, -4, NaN, 6] },
    });
    expect(status.workers).toEqual([{}, { id: "a" }]);
    expect(status.tokens).toEqual({ now: 3, stepS: 5, history: [1, 6] });
  });
});

describe("numbers in words", () => {
  it("have units that fit", () => {
    expect([bytes(1.5e9), bytes(0), bytes(2000), bytes("x")]).toEqual(["1.5 GB", "–", "2 kB", "–"]);
    expect([seconds(0.0234), seconds(3), seconds(600), seconds(9000), seconds(200_000)]).toEqual([
      "23.4 ms",
      "3.0 s",
      "10 min",
      "2.5 h",
      "2.3 d",
    ]);
    expect([rate(3.14), rate(12_345), rate(-1)]).toEqual(["3.1", "12,345", "–"]);
    expect([whole(1234.4), percent(2), percent(0.123)]).toEqual(["1,234", "100 %", "12 %"]);
    expect([word(""), word(3), word("a")]).toEqual(["–", "–", "a"]);
  });
});

describe("a sparkline", () => {
  it("reaches from its left to its right, and up to its highest value", () => {
    expect(pointsOf([0, 2, 1])).toEqual(["0.0,46.0", "150.0,2.0", "300.0,24.0"]);
    expect(pointsOf([])).toEqual([]);
    expect(pointsOf([0])).toEqual(["0.0,46.0"]);
  });
});
