/** The page: puts the parts together and does what they ask for. */

import { type ApiError, type Model, request } from "./api";
import { Asking } from "./asking";
import { type Message, path, touch, type VoteChoice } from "./conversation";
import { openShortcuts } from "./dialogs";
import { copyText } from "./dom";
import { Drafts } from "./drafts";
import { Elsewhere } from "./elsewhere";
import { failureLine } from "./failure-line";
import { Keeping, type Place } from "./keeping";
import type { Kept } from "./library";
import { Login } from "./login";
import { followLogOut, logOut } from "./logout";
import { Notices } from "./notices";
import { OpenChat } from "./open-chat";
import { Screen } from "./screen";
import { look, progress, served } from "./served";
import { ServerWatch } from "./server-watch";
import { Settings } from "./settings";
import { Shelf } from "./shelf";
import { listenForShortcuts } from "./shortcuts";
import { voteOn } from "./side-by-side";
import { NotKept } from "./store";
import { thoughtsOf } from "./thinking";
import { welcome } from "./welcome";

export class App {
  readonly #settings = new Settings({
    themed: (theme) => this.#screen.sidebar.showTheme(theme),
    moved: (place) => this.#move(place),
    copyHere: () => void this.#notices.try(() => this.#copyHere()),
    logOut: () => void logOut(this.#asking, this.#keeping, this.#drafts),
  });
  readonly #screen: Screen;
  readonly #keeping: Keeping;
  readonly #shelf: Shelf;
  readonly #chat: OpenChat;
  readonly #asking: Asking;
  readonly #watch: ServerWatch;
  readonly #notices: Notices;
  readonly #drafts = new Drafts();
  readonly #elsewhere = new Elsewhere(() => this.#sync());
  /** what is shown of the models, and how far their loads are */
  #models = ["", ""];

  constructor(root: HTMLElement) {
    this.#screen = this.#newScreen(root);
    this.#screen.sidebar.showTheme(this.#settings.preferences.theme);
    const login = new Login(this.#screen.banners, () => {
      void this.#watch.ask();
      void this.#list();
      void this.#chat.route();
    });
    this.#notices = new Notices(this.#screen.banners, login, () => void this.#watch.ask());
    this.#keeping = new Keeping(this.#settings.preferences.place, {
      listed: () => this.#syncSidebar(),
      merged: (kept) => {
        if (kept === this.#current) this.#sync();
      },
      removed: (id) => this.#removed(id),
      writing: (conversation) =>
        conversation.messages.map(({ id }) => id).filter((id) => this.#asking.answerings.has(id)),
      writtenElsewhere: (id, messages) => this.#elsewhere.heard(id, messages),
      saveFailed: (reason) => this.#notices.unsaved(reason),
    });
    this.#asking = new Asking({
      changed: (kept) => {
        if (kept === this.#current) this.#sync();
        else this.#syncSidebar();
      },
      grew: (kept, message) => {
        if (kept === this.#current) this.#screen.thread.grew(message.id);
      },
      ended: (_, message, error) => this.#ended(message, error),
      needsKey: (error) => login.need(error, true),
    });
    this.#watch = new ServerWatch({
      models: (models) => this.#gotModels(models),
      gone: (error) => this.#gone(error),
      needsKey: (error) => login.need(error),
    });
    this.#chat = new OpenChat(this.#keeping, this.#drafts, this.#notices, {
      fresh: () => this.#fresh(),
      shown: (written) => {
        if (written) this.#screen.composer.show(written);
        this.#sync();
        this.#screen.thread.follow();
      },
      reached: () => this.#screen.frame.chosen(),
      missing: () => this.#screen.composer.takeBack(),
      changed: () => this.#sync(),
    });
    this.#shelf = new Shelf(this.#keeping, this.#notices, {
      renamed: () => this.#sync(),
      leaving: (kept) => this.#asking.stop(kept.conversation),
      removed: (id) => this.#removed(id),
      models: () => served(this.#watch.models, []),
    });
  }

  async start(): Promise<void> {
    listenForShortcuts(this);
    addEventListener("pagehide", () => this.#keeping.leave());
    followLogOut();
    void this.#watch.ask();
    this.#chat.start();
    if (!this.#screen.frame.isNarrow) this.#screen.composer.focus();
    // the list says where chats are kept
    await this.#list();
    await this.#chat.route();
    this.#sync();
  }

  get #current(): Kept {
    return this.#chat.current;
  }

  #newScreen(root: HTMLElement): Screen {
    return new Screen(root, {
      sidebar: {
        fresh: () => this.fresh(),
        search: (text) => this.#shelf.search(text),
        rename: (id, title) => this.#shelf.rename(id, title),
        remove: (summary) => this.#shelf.remove(summary),
        export: (id, form) => this.#shelf.export(id, form),
        import: (files) => void this.#shelf.import(files),
        settings: () => this.#settings.open(this.#keeping),
        theme: () => this.#settings.nextTheme(),
      },
      thread: {
        edit: (message, text) => this.#do(() => this.#asking.edit(this.#current, message, text)),
        regenerate: (message) => this.#do(() => this.#asking.regenerate(this.#current, message)),
        continue: (message) => this.#do(() => this.#asking.continue(this.#current, message)),
        step: (message, by) => this.#asking.step(this.#current, message, by),
        vote: (left, choice) => void this.#notices.try(() => this.#vote(left, choice)),
      },
      composer: {
        send: (text, files) => {
          this.#do(() => this.#asking.send(this.#current, text, files));
          this.#chat.named();
        },
        stop: () => this.stop(),
        drafted: (written) => this.#drafts.changed(written),
      },
      pickModels: (models, isBlind) => this.#pickModels(models, isBlind),
      sampled: (system, sampling) => {
        Object.assign(this.#current.conversation, { system, sampling });
        this.#settings.remember({ system, sampling });
        this.#changedSettings();
      },
      welcome: () => welcome(this.#current.conversation.models, this.#watch.models),
    });
  }

  /* what shortcuts and buttons do */

  fresh(): void {
    this.#chat.fresh();
    this.#screen.composer.focus();
    this.#screen.frame.chosen();
  }

  /** What waits to be sent is taken back, before an answer is stopped. */
  stop(): void {
    if (this.isWaiting) this.#screen.composer.takeBack();
    else this.#asking.stop(this.#current.conversation);
  }

  get isWaiting(): boolean {
    return this.#screen.composer.isWished;
  }

  get isBusy(): boolean {
    return this.#asking.isBusy(this.#current.conversation);
  }

  regenerateLast(): void {
    const { conversation } = this.#current;
    if (this.isBusy) return;
    for (const side of conversation.models.keys()) {
      const last = path(conversation, side).at(-1);
      if (last?.role === "assistant") this.#asking.regenerate(this.#current, last);
      else if (last) this.#asking.answer(this.#current, side, last.id);
    }
  }

  async copyLast(): Promise<void> {
    const last = path(this.#current.conversation).findLast((each) => each.role === "assistant");
    if (last && (await copyText(thoughtsOf(last.content).answer)))
      this.#screen.announcer.say("Copied");
  }

  writeQuestion(): void {
    this.#screen.composer.focus();
  }

  search(): void {
    this.#screen.frame.showSidebar(true);
    this.#screen.sidebar.focusSearch();
  }

  neighbour(by: number): void {
    const id = this.#screen.sidebar.neighbour(this.#current.conversation.id, by);
    if (id) location.hash = `#/c/${id}`;
  }

  togglePanel(): void {
    this.#screen.frame.togglePanel();
  }

  toggleSidebar(): void {
    this.#screen.frame.toggleSidebar();
  }

  shortcuts(): void {
    openShortcuts();
  }

  /* conversations */

  #fresh(): Kept {
    const { models, system, sampling } = this.#settings.preferences;
    const wanted = served(this.#watch?.models ?? [], models);
    return this.#keeping.library.fresh(wanted, system, { ...sampling });
  }

  #removed(id: string): void {
    if (id === this.#current.conversation.id) this.fresh();
  }

  async #list(): Promise<void> {
    await this.#notices.try(async () => {
      try {
        await this.#keeping.list();
      } catch (error) {
        if (!(error instanceof NotKept)) throw error;
        // what was asked in the meantime goes along
        this.#keeping.stayHere(this.#current);
        this.#sync();
        await this.#keeping.list();
        await this.#chat.route();
      }
    });
  }

  async #vote(left: Message, choice: VoteChoice): Promise<void> {
    const { conversation } = this.#current;
    const vote = voteOn(conversation, left, choice);
    // what is kept in the browser alone is not sent for a vote, either
    if (this.#keeping.place === "server") {
      await request("/page/votes", { method: "POST", body: JSON.stringify(vote) });
    }
    conversation.votes = { ...conversation.votes, [left.id]: choice };
    touch(conversation);
    this.#current.changed();
    this.#screen.announcer.say("Thank you for the vote");
    this.#sync();
  }

  /* what is asked */

  #do(ask: () => void): void {
    this.#settings.remember({ models: this.#current.conversation.models });
    ask();
    this.#screen.thread.follow();
    this.#screen.announcer.say("Asked");
  }

  #ended(message: Message, error: ApiError | null): void {
    if (error) {
      if (error.isUnreachable || error.status === 503) void this.#watch.ask();
      this.#screen.announcer.say(`The answer broke off: ${error.message}`);
      return;
    }
    const num = message.usage?.completion_tokens;
    this.#screen.announcer.say(
      num !== undefined ? `Answer complete, ${num} tokens` : "Answer stopped",
    );
  }

  #pickModels(models: string[], isBlind: boolean): void {
    const { conversation } = this.#current;
    if (conversation.models.length !== models.length && conversation.messages.length > 0) {
      // what was said to one model was not said to two
      const kept = this.#keeping.library.fresh(models, conversation.system, conversation.sampling);
      kept.conversation.is_blind = isBlind;
      this.#settings.remember({ models });
      history.pushState(null, "", "#/");
      this.#chat.show(kept);
      return;
    }
    conversation.models = models;
    conversation.is_blind = isBlind;
    this.#settings.remember({ models });
    this.#changedSettings();
    this.#sync();
  }

  #changedSettings(): void {
    const { conversation } = this.#current;
    if (conversation.messages.length === 0) return;
    touch(conversation);
    this.#current.changed();
  }

  #tail(side: number): HTMLElement | null {
    const { conversation } = this.#current;
    const last = path(conversation, side).at(-1);
    if (!last || last.role === "assistant" || this.isBusy) return null;
    const again = () => this.#do(() => this.#asking.answer(this.#current, side, last.id));
    return failureLine(this.#asking.failures.get(last.id), {
      again,
      edit: () => this.#screen.thread.editLast(),
      shorten: () => {
        conversation.sampling = { ...conversation.sampling, truncation: "rolling" };
        this.#screen.panel.show(conversation);
        again();
      },
      askElsewhere: () => {
        this.fresh();
        this.#chat.show(this.#fresh());
        this.#screen.composer.write(last.content);
      },
    });
  }

  /* the server */

  #gotModels(models: Model[]): void {
    const [shown, loaded] = this.#models;
    this.#models = [look(models), progress(models)];
    if (this.#models[0] === shown) {
      // who reads, writes or has opened something is left alone
      if (this.#models[1] !== loaded) this.#screen.picker.setModels(models);
      return;
    }
    const { conversation } = this.#current;
    if (conversation.messages.length === 0 || conversation.models.includes("")) {
      conversation.models = served(models, conversation.models);
    }
    this.#screen.picker.setModels(models);
    this.#sync();
  }

  #gone(error: ApiError | null): void {
    this.#notices.gone(error);
    if (error) return;
    this.#keeping.retry();
    void this.#list();
    void this.#chat.route();
  }

  #sync(): void {
    const { conversation } = this.#current;
    this.#screen.sync({
      conversation,
      asking: this.#asking,
      elsewhere: this.#elsewhere.messages(conversation.id),
      tail: (side) => this.#tail(side),
      models: this.#watch.models,
    });
    this.#syncSidebar();
    // last: what has waited for this goes out now
    const isServed = !conversation.models.includes("");
    const missing = this.#chat.isOnItsWay
      ? "this chat is open"
      : isServed
        ? null
        : "a model is there";
    this.#screen.composer.setHold(missing);
  }

  #syncSidebar(): void {
    const { library } = this.#keeping;
    this.#screen.sidebar.sync(
      library.summaries,
      this.#current.conversation.id,
      this.#asking.running(library.openOnes),
    );
  }

  /** Go on with the conversations of the other place. An answer that comes ends where its chat is. */
  #move(place: Place): void {
    if (this.#asking.answerings.size > 0) {
      const where = this.#keeping.place === "server" ? "on the server" : "in this browser";
      this.#notices.tell(`The answer that is coming goes on, and is kept ${where} as its chat is.`);
    }
    this.#keeping.place = place;
    this.fresh();
    this.#chat.show(this.#fresh());
    void this.#list();
  }

  async #copyHere(): Promise<void> {
    const num = await this.#keeping.copyHere();
    this.#notices.tell(num === 1 ? "1 chat was copied" : `${num} chats were copied`);
  }
}
