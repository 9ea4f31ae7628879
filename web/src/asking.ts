/**
 * What is asked and answered in all conversations: send, stop, again, go on, another version.
 *
 * Changes conversations and runs the answers that they wait for. Knows no DOM.
 */

import { Answering } from "./answering";
import type { ApiError } from "./api";
import {
  append,
  CHAT_TEMPERATURE,
  type Conversation,
  dropEmpty,
  find,
  leafBelow,
  type Message,
  path,
  promptTo,
  siblings,
  type TextFile,
  touch,
} from "./conversation";
import type { Kept } from "./library";

/** Saving all of a long conversation again and again has to stay cheap while an answer comes. */
const SAVE_EVERY_MS = 3000;

export interface AskingListener {
  /** Messages of a conversation, or how its answers go, are others. */
  changed(kept: Kept): void;
  grew(kept: Kept, message: Message): void;
  ended(kept: Kept, message: Message, error: ApiError | null): void;
  /** The key is missing or wrong; resolves with whether there is another now. */
  needsKey(error: ApiError): Promise<boolean>;
}

export class Asking {
  /** by the id of the message that is being written */
  readonly answerings = new Map<string, Answering>();
  /** why a question has no answer, by its id */
  readonly failures = new Map<string, ApiError>();
  readonly #runs = new Set<Promise<void>>();

  constructor(private readonly listener: AskingListener) {}

  isBusy(conversation: Conversation): boolean {
    return conversation.messages.some((message) => this.answerings.has(message.id));
  }

  /** Ids of the conversations in which an answer comes. */
  running(all: Kept[]): Set<string> {
    return new Set(
      all.filter((kept) => this.isBusy(kept.conversation)).map((kept) => kept.conversation.id),
    );
  }

  send(kept: Kept, content: string, files: TextFile[]): void {
    const { conversation } = kept;
    // whose names are hidden is not told by the side, either
    const isFirst = conversation.messages.length === 0;
    if (isFirst && conversation.is_blind && Math.random() < 0.5) conversation.models.reverse();
    conversation.models.forEach((_, side) => {
      const last = find(conversation, conversation.heads[side] ?? null);
      // a question that has no answer becomes another version of this one
      const parent = last?.role === "user" ? last.parent : (last?.id ?? null);
      this.#ask(kept, side, parent, content, files);
    });
  }

  /** Ask a question otherwise. What was said below it stays, as another version. */
  edit(kept: Kept, question: Message, content: string): void {
    const { conversation } = kept;
    const place = conversation.heads.map((_, side) => path(conversation, side));
    const at = Math.max(...place.map((each) => each.findIndex(({ id }) => id === question.id)));
    place.forEach((each, side) => {
      const own = each[at];
      if (own?.role === "user") this.#ask(kept, side, own.parent, content, question.files ?? []);
    });
  }

  regenerate(kept: Kept, answer: Message): void {
    if (answer.parent !== null) this.answer(kept, answer.side ?? 0, answer.parent);
  }

  continue(kept: Kept, answer: Message): void {
    const messages = promptTo(kept.conversation, answer.id);
    void this.#run(kept, answer.side ?? 0, answer, { messages, continue_final_message: true });
  }

  /** Answer a question that stands at the end of a side. */
  answer(kept: Kept, side: number, question: string): void {
    const { conversation } = kept;
    const model = conversation.models[side] ?? "";
    this.failures.delete(question);
    const messages = promptTo(conversation, question);
    const answer = append(conversation, side, question, { role: "assistant", content: "", model });
    void this.#run(kept, side, answer, { messages });
  }

  step(kept: Kept, message: Message, by: number): void {
    const { conversation } = kept;
    const versions = siblings(conversation, message);
    const wanted = versions[versions.findIndex((each) => each.id === message.id) + by];
    if (!wanted) return;
    conversation.heads[message.side ?? 0] = leafBelow(conversation, wanted.id);
    touch(conversation);
    kept.changed();
    this.listener.changed(kept);
  }

  stop(conversation: Conversation): void {
    for (const message of conversation.messages) this.answerings.get(message.id)?.stop();
  }

  /** Resolves when the last word of each is in its message. */
  async stopAll(): Promise<void> {
    for (const answering of this.answerings.values()) answering.stop();
    await Promise.all(this.#runs);
  }

  #ask(kept: Kept, side: number, parent: string | null, content: string, files: TextFile[]): void {
    const question = { role: "user" as const, content, ...(files.length > 0 ? { files } : {}) };
    const { id } = append(kept.conversation, side, parent, question);
    // who reloads the page right now finds it
    kept.changed(0);
    this.answer(kept, side, id);
  }

  async #run(
    kept: Kept,
    side: number,
    answer: Message,
    body: { messages: ReturnType<typeof promptTo>; continue_final_message?: boolean },
  ): Promise<void> {
    const { conversation } = kept;
    const model = body.continue_final_message
      ? (answer.model ?? conversation.models[side] ?? "")
      : (conversation.models[side] ?? "");
    let failure: ApiError | null = null;
    const answering = new Answering(answer, {
      grew: () => {
        kept.changed(SAVE_EVERY_MS);
        this.listener.grew(kept, answer);
      },
      waited: () => this.listener.changed(kept),
      ended: (error) => {
        failure = error;
      },
    });
    this.answerings.set(answer.id, answering);
    this.listener.changed(kept);
    const temperature = CHAT_TEMPERATURE;
    const run = answering
      .run({ temperature, ...conversation.sampling, model, ...body })
      .then(() => {
        this.answerings.delete(answer.id);
        touch(conversation);
        this.#settle(kept, side, answer, failure);
      });
    this.#runs.add(run);
    await run.finally(() => this.#runs.delete(run));
  }

  #settle(kept: Kept, side: number, answer: Message, failure: ApiError | null): void {
    const { conversation } = kept;
    const question = answer.parent;
    if (failure && answer.content === "" && question !== null) {
      dropEmpty(conversation, answer.id);
      this.failures.set(question, failure);
      if (failure.status === 401) {
        void this.listener.needsKey(failure).then((isThere) => {
          if (isThere && this.failures.has(question)) this.answer(kept, side, question);
        });
      }
    }
    kept.changed(0);
    this.listener.ended(kept, answer, failure);
    this.listener.changed(kept);
  }
}
