/**
 * One answer while it comes: asks for it, writes it into its message, says how it goes.
 *
 * Knows the API and a message; no DOM, no store.
 */

import { ApiError, type ChatRequest, isAbort, streamChat } from "./api";
import type { Message } from "./conversation";

export interface Waiting {
  /** place in the server's queue; 1 is next */
  place?: number;
  loadedBytes?: number;
  totalBytes?: number;
}

export interface AnsweringListener {
  /** There is more text. */
  grew(): void;
  /** Something else is to be shown: the place in the queue, how much is loaded. */
  waited(): void;
  /** It is over; `error` says why before its end. */
  ended(error: ApiError | null): void;
}

export class Answering {
  readonly waiting: Waiting = {};
  readonly startedAt = performance.now();
  #firstAt: number | undefined;
  #lastAt = 0;
  #numPieces = 0;
  readonly #abort = new AbortController();
  /** of an answer that goes on, what it had before */
  readonly #previous: number;

  constructor(
    readonly message: Message,
    private readonly listener: AnsweringListener,
  ) {
    this.#previous = message.usage?.completion_tokens ?? 0;
    message.partial = true;
    delete message.error;
    delete message.finish_reason;
    // what it was told of does not hold any more
    delete message.usage;
  }

  get hasBegun(): boolean {
    return this.#firstAt !== undefined;
  }

  /** Pieces of text a second up to now; about one is a token. */
  get rate(): number {
    const took = (this.#lastAt - (this.#firstAt ?? 0)) / 1000;
    return took > 0.2 ? (this.#numPieces - 1) / took : 0;
  }

  stop(): void {
    this.#abort.abort();
  }

  async run(request: ChatRequest): Promise<void> {
    const { message } = this;
    let error: ApiError | null = null;
    try {
      await streamChat(
        request,
        {
          text: (text) => {
            this.#lastAt = performance.now();
            this.#firstAt ??= this.#lastAt;
            this.#numPieces += 1;
            message.content += text;
            this.listener.grew();
          },
          place: (place) => {
            this.waiting.place = place;
            this.listener.waited();
          },
          loading: (loadedBytes, totalBytes) => {
            Object.assign(this.waiting, { loadedBytes, totalBytes });
            this.listener.waited();
          },
          finish: (reason) => {
            message.finish_reason = reason;
          },
          usage: (usage) => {
            message.usage = {
              ...usage,
              // a prompt that ends in what was there already has counted it
              completion_tokens: usage.completion_tokens + this.#previous,
              prompt_tokens: Math.max(0, usage.prompt_tokens - this.#previous),
            };
            this.#measure(usage.completion_tokens);
          },
        },
        this.#abort.signal,
      );
      delete message.partial;
    } catch (failure) {
      if (!isAbort(failure)) {
        error =
          failure instanceof ApiError ? failure : new ApiError(String(failure), "bad_stream", 0);
        message.error = error.message;
      } else {
        message.finish_reason = "stopped";
      }
      this.#measure(this.#numPieces);
    }
    this.listener.ended(error);
  }

  #measure(numTokens: number): void {
    if (this.#firstAt === undefined) return;
    this.message.ttft_s = Math.round(this.#firstAt - this.startedAt) / 1000;
    const took = (this.#lastAt - this.#firstAt) / 1000;
    if (numTokens > 1 && took > 0) {
      this.message.tokens_per_s = Math.round(((numTokens - 1) / took) * 10) / 10;
    }
  }
}
