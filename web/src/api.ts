/**
 * The server's API: models, readiness, streamed answers, anything in JSON.
 *
 * Knows requests and their failures; no DOM, no conversation. Every failure is an `ApiError` with
 * one sentence, but for an abort, which is the caller's own.
 */

import type { Usage, WireMessage } from "./conversation";
import { key } from "./key";
import { SSEDecoder } from "./sse";

/** A server sends comments while it has nothing to say; after this silence it is gone. */
const SILENCE_MS = 90_000;

export class ApiError extends Error {
  constructor(
    message: string,
    readonly code: string,
    /** 0: there was no answer */
    readonly status: number,
    readonly retryAfterS?: number,
    /** the whole answer */
    readonly body?: unknown,
  ) {
    super(message);
    this.name = "ApiError";
  }

  get isUnreachable(): boolean {
    return this.status === 0;
  }
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export interface Model {
  name: string;
  /** ready, or what it does until it is */
  state: string;
  loadedBytes?: number;
  totalBytes?: number;
  contextLength?: number;
  device?: string;
  isForChat: boolean;
}

export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  const bearer = key();
  if (bearer) headers.set("authorization", `Bearer ${bearer}`);
  if (init.body !== undefined && init.body !== null)
    headers.set("content-type", "application/json");
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("the server does not answer", "unreachable", 0);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function getJson(path: string, init: RequestInit = {}): Promise<unknown> {
  const response = await request(path, init);
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(`the answer to ${path} is not JSON`, "bad_answer", response.status);
  }
}

async function refusal(response: Response): Promise<ApiError> {
  let body: unknown;
  try {
    body = await response.json();
  } catch {
    body = undefined;
  }
  const { message, code } = errorOf(record(body).error);
  const wait = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
  return new ApiError(
    message || `the server answered with status ${response.status}`,
    code,
    response.status,
    Number.isFinite(wait) ? wait : undefined,
    body,
  );
}

function errorOf(value: unknown): { message: string; code: string } {
  if (typeof value === "string") return { message: value, code: "error" };
  const { message, code, type } = record(value);
  return {
    message: text(message) ?? "",
    code: text(code) ?? text(type) ?? "error",
  };
}

/** What is served, and what is on its way. */
export async function models(signal?: AbortSignal): Promise<Model[]> {
  const init = signal ? { signal } : {};
  const listed = record(await getJson("/v1/models", init)).data;
  const found = new Map<string, Model>();
  for (const entry of Array.isArray(listed) ? listed : []) {
    const model = modelOf(record(entry));
    if (model) found.set(model.name, model);
  }
  const isAllThere = found.size > 0 && [...found.values()].every(({ state }) => state === "ready");
  // how far the others are
  for (const [name, state] of isAllThere ? [] : await readiness(init)) {
    const model = found.get(name);
    if (model) Object.assign(model, state);
    else found.set(name, { name, isForChat: true, ...state });
  }
  return [...found.values()];
}

type State = Pick<Model, "state" | "loadedBytes" | "totalBytes">;

async function readiness(init: RequestInit): Promise<Map<string, State>> {
  let body: unknown;
  try {
    body = await getJson("/health/ready", init);
  } catch (error) {
    // 503 says how far it is
    if (!(error instanceof ApiError) || error.isUnreachable) throw error;
    body = error.body;
  }
  const states = new Map<string, State>();
  const listed = record(body).models;
  for (const entry of Array.isArray(listed) ? listed : []) {
    const { name, state, loaded_bytes, total_bytes } = record(entry);
    if (typeof name !== "string") continue;
    const found: State = { state: text(state) ?? "ready" };
    if (count(loaded_bytes) !== undefined) found.loadedBytes = count(loaded_bytes) as number;
    if (count(total_bytes) !== undefined) found.totalBytes = count(total_bytes) as number;
    states.set(name, found);
  }
  return states;
}

function modelOf(entry: Record<string, unknown>): Model | undefined {
  const name = text(entry.id);
  if (!name) return undefined;
  const ours = record(entry.chatserve);
  const model: Model = {
    name,
    state: text(ours.state) ?? text(entry.state) ?? "ready",
    isForChat: ours.embeddings_only !== true,
  };
  const contextLength = count(ours.context_length) ?? count(entry.max_model_len);
  if (contextLength !== undefined) model.contextLength = contextLength;
  const device = text(ours.device);
  if (device !== undefined) model.device = device;
  return model;
}

export interface ChatRequest {
  model: string;
  messages: WireMessage[];
  continue_final_message?: boolean;
  [field: string]: unknown;
}

/** What an answer tells while it comes. */
export interface Listener {
  text(text: string): void;
  /** 1 is next */
  place(place: number): void;
  loading(loadedBytes: number, totalBytes: number): void;
  finish(reason: string): void;
  usage(usage: Usage): void;
}

/**
 * Ask for an answer and hear it to its end. Rejects with what broke it off: an answer without
 * `[DONE]` is not whole.
 */
export async function streamChat(
  body: ChatRequest,
  listener: Listener,
  signal: AbortSignal,
): Promise<void> {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  const both = AbortSignal.any([signal, silence.signal]);
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal: both,
    });
    const reader = response.body?.getReader();
    if (!reader) throw new ApiError("the answer has no body", "bad_stream", response.status);
    const decoder = new SSEDecoder((comment) => hearComment(comment, listener));
    for (;;) {
      const { done, value } = await read(reader);
      if (done) break;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      for (const { data } of decoder.feed(value)) {
        if (data === "[DONE]") return;
        hear(data, listener);
      }
    }
    throw new ApiError("the connection closed before the answer was whole", "broken_off", 0);
  } catch (error) {
    if (silence.signal.aborted && !signal.aborted) {
      throw new ApiError("the server fell silent", "broken_off", 0);
    }
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

async function read(
  reader: ReadableStreamDefaultReader<Uint8Array>,
): Promise<{ done: true; value?: never } | { done: false; value: Uint8Array }> {
  try {
    const { done, value } = await reader.read();
    return done ? { done } : { done, value };
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("the connection was lost before the answer was whole", "broken_off", 0);
  }
}

function hear(data: string, listener: Listener): void {
  let event: Record<string, unknown>;
  try {
    event = record(JSON.parse(data));
  } catch {
    throw new ApiError("the server sent an event that is not JSON", "bad_stream", 200);
  }
  if (event.error) {
    const { message, code } = errorOf(event.error);
    throw new ApiError(message || "the server failed", code, 200);
  }
  const choice = record(Array.isArray(event.choices) ? event.choices[0] : undefined);
  const content = text(record(choice.delta).content);
  if (content) listener.text(wellFormed(content));
  const reason = text(choice.finish_reason);
  if (reason) listener.finish(reason);
  const usage = record(event.usage);
  const prompt_tokens = count(usage.prompt_tokens);
  const completion_tokens = count(usage.completion_tokens);
  if (prompt_tokens !== undefined && completion_tokens !== undefined) {
    const heard: Usage = { prompt_tokens, completion_tokens };
    if (Array.isArray(usage.messages_dropped)) {
      heard.messages_dropped = usage.messages_dropped.filter((place) => typeof place === "number");
    }
    listener.usage(heard);
  }
}

function hearComment(comment: string, listener: Listener): void {
  const queue = /^queue (\d{1,9})$/.exec(comment);
  if (queue) listener.place(Number(queue[1]));
  const loading = /^loading (?:\S+ )?(\d{1,15})[ /](\d{1,15})$/.exec(comment);
  if (loading) listener.loading(Number(loading[1]), Number(loading[2]));
}

/** JSON can spell half a surrogate pair, which no request can hold. */
function wellFormed(value: string): string {
  return /[\ud800-\udfff]/.test(value)
    ? value.replace(
        /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
        "\ufffd",
      )
    : value;
}

export function record(value: unknown): Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Record<string, unknown>)
    : {};
}

function text(value: unknown): string | undefined {
  return typeof value === "string" ? value : undefined;
}

function count(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : undefined;
}
