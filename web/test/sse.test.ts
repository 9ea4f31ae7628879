import { expect, test } from "vitest";
import { SSEDecoder, type ServerSentEvent } from "../src/sse";

const STREAM =
  '\ufeff: ping\r\n\r\ndata: {"a": "é😀"}\r\n\r\n: queue 3\n\nevent: x\rdata: one\rdata: two\r\rdata\n\nid: 7\ndata:[DONE]\n\ndata: cut off';
const EVENTS = [
  { event: "message", data: '{"a": "é😀"}' },
  { event: "x", data: "one\ntwo" },
  { event: "message", data: "" },
  { event: "message", data: "[DONE]" },
];

function decode(pieces: Uint8Array[]): { events: ServerSentEvent[]; comments: string[] } {
  const comments: string[] = [];
  const decoder = new SSEDecoder((comment) => comments.push(comment));
  return { events: pieces.flatMap((piece) => decoder.feed(piece)), comments };
}

test("a stream may be cut anywhere", () => {
  const bytes = new TextEncoder().encode(STREAM);
  const whole = decode([bytes]);
  expect(whole).toEqual({ events: EVENTS, comments: ["ping", "queue 3"] });
  for (let cut = 1; cut < bytes.length; cut++) {
    expect(decode([bytes.slice(0, cut), bytes.slice(cut)])).toEqual(whole);
  }
  expect(decode(Array.from(bytes, (byte) => Uint8Array.of(byte)))).toEqual(whole);
});

test("a line without an end is refused", () => {
  const decoder = new SSEDecoder();
  const piece = new TextEncoder().encode("x".repeat(1024 * 1024));
  expect(() => {
    for (let i = 0; i < 5; i++) decoder.feed(piece);
  }).toThrow("too long");
});
