/** Where conversations are kept: what each such place can do. */

import type { Conversation, Summary } from "./conversation";

export interface Store {
  /** Newest first; those that have a text, if one is given. */
  list(search: string): Promise<Summary[]>;
  /** null: it is gone. */
  get(id: string): Promise<Conversation | null>;
  /** Keep it, if nobody has changed it since its revision. Rejects with `Conflict`. */
  put(conversation: Conversation, isLeaving?: boolean): Promise<Summary>;
  remove(id: string): Promise<void>;
}

/** Somebody else was faster; `newer` is what they wrote. */
export class Conflict extends Error {
  constructor(readonly newer: Conversation) {
    super("the conversation was changed elsewhere");
  }
}

/** This place keeps nothing: conversations have to stay in the browser. */
export class NotKept extends Error {
  constructor() {
    super("this server keeps no chats, so they stay in this browser");
  }
}

/** Whether a conversation has a text, for those who keep them themselves. */
export function hasText(conversation: Conversation, search: string): boolean {
  const wanted = search.toLocaleLowerCase();
  return (
    conversation.title.toLocaleLowerCase().includes(wanted) ||
    conversation.messages.some((each) => each.content.toLocaleLowerCase().includes(wanted))
  );
}
