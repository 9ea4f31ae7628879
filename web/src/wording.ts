/** Numbers and reasons in words. Pure. */

import type { ApiError } from "./api";
import type { Message } from "./conversation";

const NUMBERS = new Intl.NumberFormat("en");

export function number(value: number): string {
  return NUMBERS.format(value);
}

export function bytes(value: number): string {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), units.length - 1);
  const scaled = value / 1000 ** power;
  return `${scaled.toFixed(power > 0 && scaled < 10 ? 1 : 0)} ${units[power]}`;
}

export function seconds(value: number): string {
  return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`;
}

export function place(value: number): string {
  return value <= 1 ? "next in the queue" : `place ${number(value)} in the queue`;
}

export function loading(loadedBytes: number | undefined, totalBytes: number | undefined): string {
  if (!totalBytes || loadedBytes === undefined) return "loading";
  return `loading ${Math.floor((100 * loadedBytes) / totalBytes)} % of ${bytes(totalBytes)}`;
}

const REASONS: Record<string, string> = {
  stop: "complete",
  length: "cut at its limit of tokens",
  stopped: "stopped by you",
};

/** How an answer ended and what it took, for the line below it; speed tells who it was. */
export function facts(message: Message, isNameHidden = false): string[] {
  const found: string[] = [];
  if (message.error) found.push(`broke off: ${message.error}`);
  else if (message.partial && !message.finish_reason) found.push("broke off");
  else if (message.finish_reason) {
    found.push(REASONS[message.finish_reason] ?? message.finish_reason);
  }
  if (message.usage) found.push(`${number(message.usage.completion_tokens)} tokens`);
  if (isNameHidden) return found;
  if (message.tokens_per_s) found.push(`${message.tokens_per_s.toFixed(1)} tokens/s`);
  if (message.ttft_s !== undefined) found.push(`first after ${seconds(message.ttft_s)}`);
  return found;
}

/** What to do about an error, in a few words; "" where the error says it itself. */
export function advice(error: ApiError): string {
  if (error.code === "context_length_exceeded") {
    return "Leave out the oldest turns, start a new chat, or shorten the question.";
  }
  if (error.isUnreachable) return "Your question is kept; try again when the server is back.";
  if (error.status === 429) {
    return error.retryAfterS ? `Try again in ${error.retryAfterS} s.` : "Try again in a moment.";
  }
  return "";
}

/** Under which heading of the list a time stands. */
export function day(at_s: number, now = new Date()): string {
  const midnight = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime() / 1000;
  if (at_s >= midnight) return "Today";
  if (at_s >= midnight - 86_400) return "Yesterday";
  if (at_s >= midnight - 6 * 86_400) return "This week";
  return "Earlier";
}
