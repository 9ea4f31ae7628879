/**
 * A conversation: what is kept of it, and the pure functions that change it.
 *
 * Knows no storage, no DOM and no request. The messages are a tree that only grows: each names its
 * parent, a question that is edited or an answer made anew is one more child, and `heads` say
 * which leaf is shown (two of them beside each other with two models). So two tabs, or a tab and a
 * server, that changed the same conversation are joined without losing a turn.
 *
 * This document goes over the wire (chatserve/server/conversations.py) as it is:
 *
 *     GET    /page/conversations              {"conversations": [Summary, …]}, newest first
 *     GET    /page/conversations?search=TEXT  those whose title or messages have the text
 *     GET    /page/conversations/ID           Conversation
 *     PUT    /page/conversations/ID           Conversation -> Summary. `revision` is the one that the
 *                                             change was made on, 0 for a new one; the server counts
 *                                             it up. When another was written meanwhile: 409 with
 *                                             {"error": {…}, "conversation": Conversation}
 *     DELETE /page/conversations/ID           204, also when it is gone
 *     POST   /page/votes                      Vote -> 201
 *
 * Unknown fields are kept by both sides.
 */

export type Role = "user" | "assistant";

export interface TextFile {
  name: string;
  text: string;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  /** of a chat that has outgrown the context and was cut on request */
  messages_dropped?: number[];
}

export interface Message {
  /** 1 to 64 of A-Z a-z 0-9 _ - */
  id: string;
  /** the message before it; null for the first question */
  parent: string | null;
  role: Role;
  content: string;
  /** seconds since 1970 */
  created_at: number;
  /** who answered */
  model?: string;
  /** the answer is not whole: it is still coming, was stopped, or broke off */
  partial?: boolean;
  finish_reason?: string;
  /** why it broke off, in one line */
  error?: string;
  usage?: Usage;
  ttft_s?: number;
  tokens_per_s?: number;
  /** of a question; the model reads them behind its text */
  files?: TextFile[];
  /** which of two models beside each other: a question is kept once for each */
  side?: 0 | 1;
}

/** Unless something else is chosen, as in the terminal: the API's own 1 is for programs. */
export const CHAT_TEMPERATURE = 0.7;

/** What is missing is left to the server. */
export interface Sampling {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  max_tokens?: number;
  seed?: number;
  stop?: string[];
  /** leave out the oldest turns when the context is full */
  truncation?: "rolling";
}

export interface Summary {
  /** 8 to 64 of A-Z a-z 0-9 _ - */
  id: string;
  title: string;
  /** counted up by whoever keeps it; 0 is not kept yet */
  revision: number;
  /** seconds since 1970 */
  created_at: number;
  changed_at: number;
  /** one, or two beside each other */
  models: string[];
}

export interface Conversation extends Summary {
  /** the system message, "" for none */
  system: string;
  sampling: Sampling;
  messages: Message[];
  /** the leaf that is shown of each side; [] when nothing has been asked */
  heads: string[];
  /** the title was typed, not taken from the first question */
  is_titled?: boolean;
  /** names of two models are hidden until there is a vote */
  is_blind?: boolean;
  /** the vote on each pair of answers, by the id of the left one */
  votes?: Record<string, VoteChoice>;
}

export type VoteChoice = "left" | "right" | "tie" | "both_bad";

export interface Vote {
  conversation_id: string;
  models: [string, string];
  vote: VoteChoice;
  names_hidden: boolean;
  /** what each side had said, oldest first */
  messages: [WireMessage[], WireMessage[]];
  /** seconds since 1970 */
  voted_at: number;
}

/** As the chat API takes it. */
export interface WireMessage {
  role: Role | "system";
  content: string;
}

const TITLE_LEN = 60;

export function newId(): string {
  // randomUUID is not there on a page that came over plain HTTP from another machine
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function now(): number {
  return Math.round(Date.now()) / 1000;
}

export function newConversation(
  models: string[],
  system = "",
  sampling: Sampling = {},
): Conversation {
  const created_at = now();
  return {
    id: newId(),
    title: "",
    revision: 0,
    created_at,
    changed_at: created_at,
    models,
    system,
    sampling,
    messages: [],
    heads: [],
  };
}

export function summaryOf(conversation: Conversation): Summary {
  const { id, title, revision, created_at, changed_at, models } = conversation;
  return { id, title, revision, created_at, changed_at, models };
}

export function find(conversation: Conversation, id: string | null): Message | undefined {
  return id === null ? undefined : conversation.messages.find((message) => message.id === id);
}

/** The messages that are shown of a side, oldest first. */
export function path(conversation: Conversation, side = 0): Message[] {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const found: Message[] = [];
  const seen = new Set<string>();
  let at = byId.get(conversation.heads[side] ?? "");
  // a file that was tampered with may go round in circles
  while (at && !seen.has(at.id)) {
    seen.add(at.id);
    found.push(at);
    at = at.parent === null ? undefined : byId.get(at.parent);
  }
  return found.reverse();
}

/** What was said in the same place, the message itself among it, oldest first. */
export function siblings(conversation: Conversation, message: Message): Message[] {
  return conversation.messages.filter(
    (other) =>
      other.parent === message.parent &&
      other.role === message.role &&
      (other.side ?? 0) === (message.side ?? 0),
  );
}

/** The leaf below a message: of several children always the newest. */
export function leafBelow(conversation: Conversation, id: string): string {
  const newest = new Map<string, string>();
  for (const message of conversation.messages) {
    if (message.parent !== null) newest.set(message.parent, message.id);
  }
  const seen = new Set<string>();
  let at = id;
  for (let next = newest.get(at); next !== undefined && !seen.has(next); next = newest.get(at)) {
    seen.add(next);
    at = next;
  }
  return at;
}

/** Add a message below a parent and show it. */
export function append(
  conversation: Conversation,
  side: number,
  parent: string | null,
  message: Omit<Message, "id" | "parent" | "created_at">,
): Message {
  const added: Message = { ...message, id: newId(), parent, created_at: now() };
  if (side === 1) added.side = 1;
  conversation.messages.push(added);
  conversation.heads[side] = added.id;
  touch(conversation);
  return added;
}

/** Take out an answer without a word, so that another can stand in its place. */
export function dropEmpty(conversation: Conversation, id: string): void {
  const message = find(conversation, id);
  if (message?.role !== "assistant" || message.content !== "") return;
  conversation.messages = conversation.messages.filter((other) => other.id !== id);
  conversation.heads = conversation.heads.map((head) =>
    head === id ? (message.parent ?? "") : head,
  );
}

export function touch(conversation: Conversation): void {
  conversation.changed_at = now();
  if (conversation.is_titled) return;
  const first = conversation.messages.find((message) => message.role === "user");
  if (first) conversation.title = titleFrom(first.content || (first.files?.[0]?.name ?? ""));
}

export function titleFrom(text: string): string {
  const line = text.trim().split("\n", 1)[0]?.replace(/\s+/g, " ").trim() ?? "";
  const letters = Array.from(line);
  return letters.length > TITLE_LEN
    ? `${letters
        .slice(0, TITLE_LEN - 1)
        .join("")
        .trimEnd()}…`
    : line;
}

/** What the model reads of a question: its text, and its files behind it. */
export function fullText(message: Message): string {
  const files = (message.files ?? []).map((file) => {
    // a fence that is longer than any in the file
    const longest = Math.max(2, ...(file.text.match(/`+/g) ?? []).map((ticks) => ticks.length));
    const fence = "`".repeat(longest + 1);
    return `${file.name}:\n${fence}\n${file.text}${file.text.endsWith("\n") ? "" : "\n"}${fence}`;
  });
  return [message.content, ...files].filter((part) => part !== "").join("\n\n");
}

/** The prompt that ends with a message. What was never answered is no part of it: turns alternate. */
export function promptTo(conversation: Conversation, last: string): WireMessage[] {
  const messages: WireMessage[] = [];
  if (conversation.system.trim() !== "") {
    messages.push({ role: "system", content: conversation.system });
  }
  for (const message of path({ ...conversation, heads: [last] })) {
    const content = fullText(message);
    if (content !== "") messages.push({ role: message.role, content });
    else if (message.role === "assistant" && message.id !== last) {
      if (messages.at(-1)?.role === "user") messages.pop();
    }
  }
  return messages;
}

/**
 * Both of two versions of a conversation that were changed apart: every message of either, of the
 * same one the more complete. Title and settings are those of the newer, what is shown that of `mine`.
 */
export function merge(mine: Conversation, theirs: Conversation): Conversation {
  const newer = mine.changed_at >= theirs.changed_at ? mine : theirs;
  const byId = new Map<string, Message>();
  for (const message of [...theirs.messages, ...mine.messages]) {
    const other = byId.get(message.id);
    byId.set(message.id, other === undefined ? message : moreComplete(message, other));
  }
  const messages = [...byId.values()].sort((a, b) => a.created_at - b.created_at);
  const heads = (mine.heads.length > 0 ? mine.heads : theirs.heads).map((head, side) => {
    // who has only gone on from what is shown here is followed
    const theirHead = theirs.heads[side];
    return theirHead !== undefined && isBefore(head, theirHead, byId) ? theirHead : head;
  });
  return {
    ...newer,
    revision: Math.max(mine.revision, theirs.revision),
    created_at: Math.min(mine.created_at, theirs.created_at),
    messages,
    heads: heads.filter((head) => byId.has(head)),
    votes: { ...theirs.votes, ...mine.votes },
  };
}

/** Whether a message is above another one. */
function isBefore(id: string, other: string, byId: Map<string, Message>): boolean {
  const seen = new Set<string>();
  for (
    let at = byId.get(other)?.parent ?? null;
    at !== null && !seen.has(at);
    at = byId.get(at)?.parent ?? null
  ) {
    if (at === id) return true;
    seen.add(at);
  }
  return false;
}

function moreComplete(a: Message, b: Message): Message {
  // an answer only grows: the longer of the same text is the later one, also when it grows again
  if (a.content.length !== b.content.length) {
    const [longer, shorter] = a.content.length > b.content.length ? [a, b] : [b, a];
    if (longer.content.startsWith(shorter.content)) return longer;
  }
  if (Boolean(a.partial) !== Boolean(b.partial)) return a.partial ? b : a;
  return a.content.length >= b.content.length ? a : b;
}
