/**
 * Conversations out of what somebody else wrote: the server, a file, an older page.
 *
 * Takes unknown values, gives the document of conversation.ts or null. Knows no storage.
 */

import { record } from "./api";
import {
  append,
  type Conversation,
  type Message,
  newConversation,
  type Role,
  type Sampling,
  type Summary,
  type TextFile,
  touch,
} from "./conversation";

const ID = /^[A-Za-z0-9_-]{1,64}$/;

export function readSummary(value: unknown): Summary | null {
  const { id, title, revision, created_at, changed_at, models } = record(value);
  if (!isId(id)) return null;
  return {
    id,
    title: textOr(title, ""),
    revision: numberOr(revision, 0),
    created_at: numberOr(created_at, 0),
    changed_at: numberOr(changed_at, 0),
    models: texts(models).slice(0, 2),
  };
}

export function readConversation(value: unknown): Conversation | null {
  const summary = readSummary(value);
  if (!summary) return null;
  const given = record(value);
  const messages = list(given.messages).map(readMessage);
  if (messages.some((each) => each === null)) return null;
  const known = new Set((messages as Message[]).map((each) => each.id));
  return {
    ...given,
    ...summary,
    system: textOr(given.system, ""),
    sampling: readSampling(given.sampling),
    messages: messages as Message[],
    heads: texts(given.heads)
      .filter((head) => known.has(head))
      .slice(0, 2),
  };
}

function readMessage(value: unknown): Message | null {
  const given = record(value);
  const { id, parent, role, content } = given;
  if (!isId(id) || !(parent === null || isId(parent)) || typeof content !== "string") return null;
  if (role !== "user" && role !== "assistant") return null;
  const message: Message = {
    ...given,
    id,
    parent,
    role,
    content,
    created_at: numberOr(given.created_at, 0),
  };
  const files = readFiles(given.files);
  if (files.length > 0) message.files = files;
  else delete message.files;
  return message;
}

function readFiles(value: unknown): TextFile[] {
  return list(value).flatMap((each) => {
    const { name, text } = record(each);
    return typeof name === "string" && typeof text === "string" ? [{ name, text }] : [];
  });
}

export function readSampling(value: unknown): Sampling {
  const given = record(value);
  const sampling: Sampling = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"] as const) {
    const number = given[name];
    if (typeof number === "number" && Number.isFinite(number)) sampling[name] = number;
  }
  const stop = texts(given.stop).filter((each) => each !== "");
  if (stop.length > 0) sampling.stop = stop;
  if (given.truncation === "rolling") sampling.truncation = "rolling";
  return sampling;
}

/**
 * The conversations of a file: our own export, one or many; a list of OpenAI messages; what
 * `chatserve chat` and FastChat save. Throws an `Error` that says what is wrong.
 */
export function readFile(text: string, name: string): Conversation[] {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error(`${name} is not JSON`);
  }
  const given = record(value);
  const many = Array.isArray(given.conversations) ? given.conversations : [value];
  const found = many.map((each) => readConversation(each) ?? readForeign(each));
  const good = found.filter((each) => each !== null);
  if (good.length === 0) throw new Error(`${name} holds no conversation`);
  return good;
}

function readForeign(value: unknown): Conversation | null {
  const given = record(value);
  const listed = Array.isArray(value) ? value : list(given.messages);
  const turns = listed.flatMap((each): { role: Role | "system"; content: string }[] => {
    const pair = Array.isArray(each) ? { role: each[0], content: each[1] } : record(each);
    const role = roleOf(pair.role, given.roles);
    const content = contentOf(pair.content);
    return role && content ? [{ role, content }] : [];
  });
  const model = textOr(given.model, textOr(given.model_name, ""));
  const conversation = newConversation(model ? [model] : []);
  conversation.system = textOr(given.system, textOr(given.system_message, ""));
  for (const { role, content } of turns) {
    if (role === "system") conversation.system = content;
    else append(conversation, 0, conversation.heads[0] ?? null, { role, content });
  }
  const title = textOr(given.title, "");
  if (title) Object.assign(conversation, { title, is_titled: true });
  touch(conversation);
  return conversation.messages.length > 0 ? conversation : null;
}

function roleOf(role: unknown, roles: unknown): Role | "system" | null {
  const [user, assistant] = texts(roles);
  const word = textOr(role, "").toLowerCase();
  if (word === "user" || word === "human" || word === user?.toLowerCase()) return "user";
  if (["assistant", "gpt", "bot"].includes(word) || word === assistant?.toLowerCase()) {
    return "assistant";
  }
  return word === "system" || word === "developer" ? "system" : null;
}

function contentOf(value: unknown): string {
  if (typeof value === "string") return value;
  return list(value)
    .map((part) => textOr(record(part).text, ""))
    .join("");
}

function isId(value: unknown): value is string {
  return typeof value === "string" && ID.test(value);
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

function texts(value: unknown): string[] {
  return list(value).filter((each) => typeof each === "string");
}

function textOr(value: unknown, other: string): string {
  return typeof value === "string" ? value : other;
}

function numberOr(value: unknown, other: number): number {
  return typeof value === "number" && Number.isFinite(value) ? value : other;
}
