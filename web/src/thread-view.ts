/** The messages of a conversation, one column or two, drawn at most once a frame. */

import type { Answering } from "./answering";
import { type Conversation, type Message, path, siblings, type VoteChoice } from "./conversation";
import { el, iconButton } from "./dom";
import { AnswerView, type MessageActions, QuestionView } from "./message-view";
import { areNamesHidden, sideName, voteBar } from "./side-by-side";

export interface ThreadActions extends MessageActions {
  vote(left: Message, choice: VoteChoice): void;
}

export interface ThreadState {
  conversation: Conversation;
  answerings: Map<string, Answering>;
  /** ids of messages that another tab writes */
  elsewhere: ReadonlySet<string>;
  /** what stands below the last turn of a side: a failure, or that nothing has been answered */
  tail(side: number): HTMLElement | null;
}

const FOLLOW_PX = 60;

export class ThreadView {
  readonly element: HTMLElement;
  readonly #inner = el("div", { class: "thread" });
  readonly #toEnd: HTMLButtonElement;
  #views = new Map<string, QuestionView | AnswerView>();
  #id = "";
  /** answers that have grown since they were drawn */
  readonly #grown = new Set<AnswerView>();
  #frame = 0;
  #isFollowing = true;
  #top = 0;

  constructor(
    private readonly actions: ThreadActions,
    private readonly onNews: (text: string) => void,
    private readonly empty: () => HTMLElement,
  ) {
    this.#toEnd = iconButton("down", "To the end", () => this.follow(), { class: "to-end" });
    this.element = el(
      "div",
      {
        class: "scroller",
        role: "log",
        "aria-label": "Conversation",
        "aria-live": "off",
        tabindex: -1,
      },
      this.#inner,
    );
    this.element.addEventListener("scroll", () => this.#look(), { passive: true });
    const sizes = new ResizeObserver(() => this.#stay());
    sizes.observe(this.element);
    sizes.observe(this.#inner);
  }

  get toEnd(): HTMLElement {
    return this.#toEnd;
  }

  /** Bring the elements to the state; messages that are shown already keep theirs. */
  sync(state: ThreadState): void {
    const { conversation } = state;
    if (conversation.id !== this.#id) {
      this.#id = conversation.id;
      this.#views = new Map();
      this.#isFollowing = true;
    }
    const paths =
      conversation.models.length > 1
        ? [path(conversation, 0), path(conversation, 1)]
        : [path(conversation)];
    const [left = [], right] = paths;
    const views = new Map<string, QuestionView | AnswerView>();
    const rows: HTMLElement[] = [];
    this.#inner.classList.toggle("is-wide", right !== undefined);
    if (left.length === 0 && !right?.length) rows.push(this.empty());
    const dropped = droppedBefore(left);
    for (let index = 0; index < Math.max(left.length, right?.length ?? 0); index++) {
      const messages = [left[index], right?.[index]];
      if (dropped > 0 && index === dropped) rows.push(contextLine());
      if (messages[0]?.role === "user" || messages[1]?.role === "user") {
        const question = messages[0] ?? messages[1];
        if (question) rows.push(this.#view(views, state, question, 0, left).element);
        continue;
      }
      const answers = messages.slice(0, paths.length).map((message, side) => {
        const own = paths[side] ?? [];
        return message
          ? this.#view(views, state, message, side, own).element
          : el("div", { class: "no-answer" }, state.tail(side));
      });
      if (right === undefined) rows.push(...answers);
      else {
        rows.push(el("div", { class: "pair" }, ...answers));
        const [a, b] = messages;
        const isDone = a && b && !state.answerings.has(a.id) && !state.answerings.has(b.id);
        if (isDone) {
          rows.push(
            voteBar(conversation, a, index + 1 >= left.length, (choice) =>
              this.actions.vote(a, choice),
            ),
          );
        }
      }
    }
    const tails = paths.map((each, side) =>
      each.at(-1)?.role === "user" ? state.tail(side) : null,
    );
    if (right === undefined) {
      const tail = tails[0] ?? (left.length > 0 ? state.tail(0) : null);
      if (tail) rows.push(tail);
    } else if (
      left.at(-1)?.role === "user" &&
      right.at(-1)?.role === "user" &&
      tails.some((each) => each)
    ) {
      rows.push(el("div", { class: "pair" }, ...tails.map((tail) => el("div", {}, tail))));
    }
    this.#views = views;
    replaceKeeping(this.#inner, rows);
    this.#stay();
  }

  /** An answer has more text. */
  grew(id: string): void {
    const view = this.#views.get(id);
    if (!(view instanceof AnswerView)) return;
    this.#grown.add(view);
    this.#schedule();
  }

  /** Open the last question for editing. */
  editLast(): void {
    const questions = [...this.#views.values()].filter((view) => view instanceof QuestionView);
    questions.at(-1)?.edit();
  }

  follow(): void {
    this.#isFollowing = true;
    this.#stay();
  }

  #view(
    views: Map<string, QuestionView | AnswerView>,
    state: ThreadState,
    message: Message,
    side: number,
    own: Message[],
  ): QuestionView | AnswerView {
    const { conversation, answerings } = state;
    const isUser = message.role === "user";
    const view =
      this.#views.get(message.id) ??
      (isUser ? new QuestionView(this.actions) : new AnswerView(this.actions));
    views.set(message.id, view);
    const versions = siblings(conversation, message);
    const isNameHidden = conversation.models.length > 1 && areNamesHidden(conversation);
    view.sync({
      isNameHidden,
      message,
      name: isUser ? "You" : isNameHidden ? sideName(side) : (message.model ?? "Assistant"),
      version: versions.findIndex((each) => each.id === message.id) + 1,
      versions: versions.length,
      isLast: own.at(-1)?.id === message.id,
      isBusy: conversation.messages.some((each) => answerings.has(each.id)),
      answering: answerings.get(message.id),
      isElsewhere: state.elsewhere.has(message.id),
    });
    if (answerings.has(message.id) && view instanceof AnswerView) {
      this.#grown.add(view);
      this.#schedule();
    }
    return view;
  }

  #schedule(): void {
    this.#frame ||= requestAnimationFrame((now) => this.#draw(now));
  }

  #draw(now: number): void {
    this.#frame = 0;
    for (const view of this.#grown) {
      if (!view.draw(now)) continue;
      this.#grown.delete(view);
      this.onNews(view.takeNews());
    }
    this.#stay();
    if (this.#grown.size > 0) this.#schedule();
  }

  #look(): void {
    const { scrollTop, scrollHeight, clientHeight } = this.element;
    // only whoever scrolls up wants to stay: what grows below moves the end away by itself
    if (scrollHeight - scrollTop - clientHeight < FOLLOW_PX) this.#isFollowing = true;
    else if (scrollTop < this.#top) this.#isFollowing = false;
    this.#top = scrollTop;
    this.#toEnd.hidden = this.#isFollowing;
  }

  #stay(): void {
    if (this.#isFollowing) this.element.scrollTop = this.element.scrollHeight;
    this.#toEnd.hidden = this.#isFollowing;
  }
}

/** Before which message the model sees nothing any more. */
function droppedBefore(messages: Message[]): number {
  const dropped = messages.at(-1)?.usage?.messages_dropped ?? [];
  return dropped.length;
}

function contextLine(): HTMLElement {
  return el(
    "p",
    { class: "context-line", role: "note" },
    el("span", {}, "The model no longer sees what is above: the context is full"),
  );
}

/** Make these the children; those that are there already are not taken out, so focus stays. */
function replaceKeeping(parent: HTMLElement, children: HTMLElement[]): void {
  const wanted = new Set<Node>(children);
  for (const child of [...parent.childNodes]) if (!wanted.has(child)) child.remove();
  children.forEach((child, index) => {
    const there = parent.childNodes[index];
    if (there !== child) parent.insertBefore(child, there ?? null);
  });
}
