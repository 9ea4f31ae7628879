/** The page: puts the parts together and does what they ask for. */

import { Announcer } from "./announcer";
import { ApiError, type Model, request } from "./api";
import { Asking } from "./asking";
import { Banners } from "./banner";
import { Composer } from "./composer";
import { type Message, path, type Summary, touch, type VoteChoice } from "./conversation";
import { openSettings, openShortcuts } from "./dialogs";
import { copyText, el } from "./dom";
import { Draft } from "./draft";
import { Elsewhere } from "./elsewhere";
import { failureLine } from "./failure-line";
import { Frame } from "./frame";
import { forgetKey, key } from "./key";
import { type Kept, Library } from "./library";
import { Login } from "./login";
import { ModelPicker } from "./model-picker";
import {
  applyTheme,
  type Preferences,
  readDraft,
  readPreferences,
  writeDraft,
  writePreferences,
} from "./preferences";
import { SamplingPanel } from "./sampling-panel";
import { ServerWatch } from "./server-watch";
import { listenForShortcuts } from "./shortcuts";
import { voteOn } from "./side-by-side";
import { Sidebar } from "./sidebar";
import { NotKept } from "./store";
import { BrowserStore } from "./store-browser";
import { ServerStore } from "./store-server";
import { SpareStore } from "./store-spare";
import { thoughtsOf } from "./thinking";
import { ThreadView } from "./thread-view";
import { copyAll, exportFile, type Form, importFile } from "./transfer";

const NEW = "new";
const UNDO_MS = 10_000;
/** the database of chats that the server had no room for */
const SPARE = "chatserve-spare";

export class App {
  #preferences = readPreferences();
  #library: Library;
  #current: Kept;
  readonly #open = new Set<Kept>();
  readonly #announcer = new Announcer();
  readonly #banners = new Banners();
  readonly #watch: ServerWatch;
  readonly #asking: Asking;
  readonly #sidebar: Sidebar;
  readonly #thread: ThreadView;
  readonly #composer: Composer;
  readonly #picker: ModelPicker;
  readonly #panel: SamplingPanel;
  readonly #title = el("h1", { class: "off-screen" });
  readonly #frame: Frame;
  readonly #draft = new Draft();
  readonly #login: Login;
  readonly #elsewhere = new Elsewhere(() => this.#sync());
  /** the server has said that it keeps no conversations */
  #serverKeeps = true;

  constructor(root: HTMLElement) {
    applyTheme(this.#preferences.theme);
    this.#library = this.#newLibrary(this.#preferences.place);
    this.#current = this.#fresh();
    this.#login = new Login(this.#banners, () => {
      void this.#watch.ask();
      void this.#list();
      void this.#route();
    });
    this.#asking = new Asking({
      changed: (kept) => {
        if (kept === this.#current) this.#sync();
        else this.#syncSidebar();
      },
      grew: (kept, message) => {
        if (kept === this.#current) this.#thread.grew(message.id);
      },
      ended: (_, message, error) => this.#ended(message, error),
      needsKey: (error) => this.#login.need(error, true),
    });
    this.#watch = new ServerWatch({
      models: (models) => this.#gotModels(models),
      gone: (error) => this.#gone(error),
      needsKey: (error) => this.#login.need(error),
    });
    this.#sidebar = new Sidebar({
      fresh: () => this.fresh(),
      search: (text) => void this.#try(() => this.#library.refresh(text)),
      rename: (id, title) =>
        void this.#try(async () => {
          await this.#library.rename(id, title);
          this.#sync();
        }),
      remove: (summary) => void this.#try(() => this.#remove(summary)),
      export: (id, form) => void this.#try(() => this.#export(id, form)),
      import: (files) => void this.#import(files),
      settings: () => this.#openSettings(),
      theme: () => {
        const next = { system: "light", light: "dark", dark: "system" } as const;
        this.#setTheme(next[this.#preferences.theme]);
      },
      close: () => this.#frame.showSidebar(false),
      chosen: () => this.#frame.chosen(),
    });
    this.#thread = new ThreadView(
      {
        edit: (message, text) => this.#do(() => this.#asking.edit(this.#current, message, text)),
        regenerate: (message) => this.#do(() => this.#asking.regenerate(this.#current, message)),
        continue: (message) => this.#do(() => this.#asking.continue(this.#current, message)),
        step: (message, by) => this.#asking.step(this.#current, message, by),
        vote: (left, choice) => void this.#try(() => this.#vote(left, choice)),
      },
      (news) => this.#announcer.say(news),
      () => this.#welcome(),
    );
    this.#composer = new Composer({
      send: (text, files) => {
        this.#do(() => this.#asking.send(this.#current, text, files));
        this.#address();
      },
      stop: () => this.stop(),
      drafted: (text) => this.#draft.changed(this.#draftId(), text),
      editLast: () => this.#thread.editLast(),
    });
    this.#picker = new ModelPicker((models, isBlind) => this.#pickModels(models, isBlind));
    this.#panel = new SamplingPanel(
      (system, sampling) => {
        Object.assign(this.#current.conversation, { system, sampling });
        this.#remember({ system, sampling });
        this.#changedSettings();
      },
      () => this.#frame.showPanel(false),
    );
    this.#sidebar.showTheme(this.#preferences.theme);
    this.#frame = new Frame(
      root,
      {
        sidebar: this.#sidebar.element,
        title: this.#title,
        picker: this.#picker.element,
        banners: this.#banners.element,
        thread: this.#thread.element,
        toEnd: this.#thread.toEnd,
        composer: this.#composer.element,
        panel: this.#panel.element,
        announcer: this.#announcer.element,
      },
      () => this.#composer.focus(),
    );
  }

  async start(): Promise<void> {
    listenForShortcuts(this);
    addEventListener("hashchange", () => void this.#route());
    addEventListener("pagehide", () => this.#library.leave());
    void this.#watch.ask();
    this.#show(this.#current);
    if (!this.#frame.isNarrow) this.#composer.focus();
    // the list says where chats are kept
    await this.#list();
    await this.#route();
    this.#sync();
  }

  /* what shortcuts and buttons do */

  fresh(): void {
    if (location.hash !== "" && location.hash !== "#/") location.hash = "#/";
    else this.#show(this.#fresh());
    this.#composer.focus();
    this.#frame.chosen();
  }

  stop(): void {
    this.#asking.stop(this.#current.conversation);
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
    if (last && (await copyText(thoughtsOf(last.content).answer))) this.#announcer.say("Copied");
  }

  writeQuestion(): void {
    this.#composer.focus();
  }

  search(): void {
    this.#frame.showSidebar(true);
    this.#sidebar.focusSearch();
  }

  neighbour(by: number): void {
    const id = this.#sidebar.neighbour(this.#current.conversation.id, by);
    if (id) location.hash = `#/c/${id}`;
  }

  togglePanel(): void {
    this.#frame.togglePanel();
  }

  toggleSidebar(): void {
    this.#frame.toggleSidebar();
  }

  shortcuts(): void {
    openShortcuts();
  }

  /* conversations */

  #newLibrary(place: Preferences["place"]): Library {
    const store =
      place === "server"
        ? new SpareStore(new ServerStore(), new BrowserStore(SPARE))
        : new BrowserStore();
    return new Library(store, place, {
      listed: () => this.#syncSidebar(),
      merged: (kept) => {
        if (kept === this.#current) this.#sync();
      },
      removed: (id) => {
        if (id === this.#current.conversation.id) this.fresh();
      },
      writing: (conversation) =>
        conversation.messages.map(({ id }) => id).filter((id) => this.#asking.answerings.has(id)),
      writtenElsewhere: (id, messages) => this.#elsewhere.heard(id, messages),
      saveFailed: (reason) => this.#saveFailed(reason),
    });
  }

  #fresh(): Kept {
    const { models, system, sampling } = this.#preferences;
    return this.#library.fresh(this.#served(models), system, { ...sampling });
  }

  /** Of these models those that are there, else the first that is. */
  #served(models: string[]): string[] {
    const there = (this.#watch?.models ?? []).filter((model) => model.isForChat);
    if (there.length === 0) return models.length > 0 ? models : [""];
    const served = models.filter((name) => there.some((model) => model.name === name));
    return served.length > 0 ? served : [there[0]?.name ?? ""];
  }

  async #list(): Promise<void> {
    await this.#try(async () => {
      try {
        await this.#library.refresh();
      } catch (error) {
        if (!(error instanceof NotKept)) throw error;
        // what was asked in the meantime goes along
        const kept = this.#current;
        this.#serverKeeps = false;
        this.#useLibrary("browser");
        this.#current = this.#library.adopt(kept.conversation);
        this.#sync();
        await this.#library.refresh();
        await this.#route();
      }
    });
  }

  async #route(): Promise<void> {
    const id = /^#\/c\/([A-Za-z0-9_-]+)$/.exec(location.hash)?.[1];
    if (id === undefined) {
      if (this.#current.conversation.messages.length > 0) this.#show(this.#fresh());
      return;
    }
    if (id === this.#current.conversation.id) return;
    await this.#try(async () => {
      const kept = await this.#library.open(id);
      if (location.hash !== `#/c/${id}`) return;
      if (kept) {
        this.#show(kept);
        this.#frame.chosen();
      } else {
        this.#banners.show(
          "notice",
          "This chat is not here: it was deleted, or it is kept elsewhere.",
          undefined,
          UNDO_MS,
        );
        location.hash = "#/";
      }
    });
  }

  #show(kept: Kept): void {
    this.#draft.save();
    this.#current = kept;
    this.#composer.setText(readDraft(this.#draftId()));
    this.#panel.show(kept.conversation);
    this.#sync();
    this.#thread.follow();
  }

  /** The address of a conversation that has just got its first question. */
  #address(): void {
    const hash = `#/c/${this.#current.conversation.id}`;
    if (location.hash === hash) return;
    writeDraft(NEW, "");
    history.pushState(null, "", hash);
    this.#syncSidebar();
  }

  async #remove(summary: Summary): Promise<void> {
    const kept = await this.#library.open(summary.id);
    if (kept) this.#asking.stop(kept.conversation);
    await this.#library.remove(summary.id);
    if (summary.id === this.#current.conversation.id) this.fresh();
    if (!kept) return;
    const undo = async () => {
      this.#banners.hide("undo");
      await this.#try(() => this.#library.add(kept.conversation));
    };
    const title = summary.title || "Untitled";
    this.#banners.show(
      "undo",
      `Deleted: ${title}`,
      { label: "Undo", run: () => void undo() },
      UNDO_MS,
    );
  }

  async #export(id: string, form: Form): Promise<void> {
    const kept = await this.#library.open(id);
    if (kept) exportFile(kept.conversation, form);
  }

  async #import(files: File[]): Promise<void> {
    for (const file of files) {
      await this.#try(async () => {
        const id = await importFile(file, this.#library, this.#served([]));
        if (id !== undefined) location.hash = `#/c/${id}`;
      });
    }
  }

  async #vote(left: Message, choice: VoteChoice): Promise<void> {
    const { conversation } = this.#current;
    const vote = voteOn(conversation, left, choice);
    // what is kept in the browser alone is not sent for a vote, either
    if (this.#library.place === "server") {
      await request("/page/votes", { method: "POST", body: JSON.stringify(vote) });
    }
    conversation.votes = { ...conversation.votes, [left.id]: choice };
    touch(conversation);
    this.#current.changed();
    this.#announcer.say("Thank you for the vote");
    this.#sync();
  }

  /* what is asked */

  #do(ask: () => void): void {
    this.#open.add(this.#current);
    this.#remember({ models: this.#current.conversation.models });
    ask();
    this.#thread.follow();
    this.#announcer.say("Asked");
  }

  #ended(message: Message, error: ApiError | null): void {
    if (error) {
      if (error.isUnreachable || error.status === 503) void this.#watch.ask();
      this.#announcer.say(`The answer broke off: ${error.message}`);
      return;
    }
    const { usage } = message;
    this.#announcer.say(
      usage ? `Answer complete, ${usage.completion_tokens} tokens` : "Answer stopped",
    );
  }

  #pickModels(models: string[], isBlind: boolean): void {
    const { conversation } = this.#current;
    if (conversation.models.length !== models.length && conversation.messages.length > 0) {
      // what was said to one model was not said to two
      const kept = this.#library.fresh(models, conversation.system, conversation.sampling);
      kept.conversation.is_blind = isBlind;
      this.#remember({ models });
      history.pushState(null, "", "#/");
      this.#show(kept);
      return;
    }
    conversation.models = models;
    conversation.is_blind = isBlind;
    this.#remember({ models });
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
    if (!last || this.isBusy) return null;
    if (last.role === "assistant") return null;
    const again = () => this.#do(() => this.#asking.answer(this.#current, side, last.id));
    return failureLine(this.#asking.failures.get(last.id), {
      again,
      edit: () => this.#thread.editLast(),
      shorten: () => {
        conversation.sampling = { ...conversation.sampling, truncation: "rolling" };
        this.#panel.show(conversation);
        again();
      },
      askElsewhere: () => this.#askElsewhere(last.content),
    });
  }

  #askElsewhere(text: string): void {
    this.fresh();
    this.#show(this.#fresh());
    this.#composer.setText(text);
    this.#draft.changed(this.#draftId(), text);
  }

  /* the server */

  #gotModels(models: Model[]): void {
    const { conversation } = this.#current;
    if (conversation.messages.length === 0 || conversation.models.includes("")) {
      conversation.models = this.#served(conversation.models);
    }
    this.#picker.setModels(models);
    this.#sync();
  }

  #gone(error: ApiError | null): void {
    if (error) {
      const text = error.isUnreachable
        ? "The server does not answer. Nothing is lost; this page goes on when it is back."
        : `The server cannot answer now: ${error.message}`;
      this.#banners.show("gone", text, { label: "Try now", run: () => void this.#watch.ask() });
      return;
    }
    this.#banners.hide("gone");
    this.#library.retry();
    void this.#list();
    void this.#route();
  }

  #saveFailed(reason: string | null): void {
    if (reason === null) this.#banners.hide("unsaved");
    else if (!this.#watch.isGone) {
      this.#banners.show("unsaved", `Not saved yet: ${reason}. It is tried again.`);
    }
  }

  /** Do what may fail, and tell it in a line. */
  async #try(act: () => Promise<void>): Promise<void> {
    try {
      await act();
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) {
        await this.#login.need(error);
      } else if (error instanceof ApiError && error.isUnreachable) {
        void this.#watch.ask();
      } else {
        const text = error instanceof Error ? error.message : String(error);
        this.#banners.show(
          "notice",
          text.charAt(0).toUpperCase() + text.slice(1),
          undefined,
          UNDO_MS,
        );
      }
    }
  }

  /* what is shown */

  #sync(): void {
    const { conversation } = this.#current;
    this.#title.textContent = conversation.title || "New chat";
    document.title = conversation.title ? `${conversation.title} · chatserve` : "chatserve";
    this.#picker.show(conversation, this.isBusy);
    this.#panel.show(conversation);
    this.#thread.sync({
      conversation,
      answerings: this.#asking.answerings,
      elsewhere: this.#elsewhere.messages(conversation.id),
      tail: (side) => this.#tail(side),
    });
    this.#composer.setBusy(this.isBusy);
    // before the server has said what it serves there is nobody to ask
    this.#composer.setCanSend(!conversation.models.includes(""));
    const model = this.#watch.models.find(({ name }) => name === conversation.models[0]);
    const usage = path(conversation).findLast((each) => each.usage)?.usage;
    this.#composer.setContext(
      usage && usage.prompt_tokens + usage.completion_tokens,
      model?.contextLength,
    );
    this.#syncSidebar();
  }

  #syncSidebar(): void {
    this.#sidebar?.sync(
      this.#library.summaries,
      this.#current.conversation.id,
      this.#asking.running([...this.#open]),
    );
  }

  #welcome(): HTMLElement {
    const models = this.#watch.models.filter((model) => model.isForChat);
    const name = this.#current.conversation.models.filter((each) => each !== "").join(" and ");
    return el(
      "div",
      { class: "welcome" },
      el("p", { class: "welcome-title" }, name ? `Chat with ${name}` : "No model is served yet"),
      el(
        "p",
        {},
        models.length > 0 || name
          ? "What you write goes to this server alone."
          : "The server has started, its models are on their way.",
      ),
    );
  }

  #openSettings(): void {
    const place = this.#serverKeeps ? this.#preferences.place : "browser";
    openSettings({ ...this.#preferences, place }, this.#serverKeeps, {
      changed: (preferences) => {
        const { theme, place } = preferences;
        this.#setTheme(theme);
        if (this.#serverKeeps) this.#remember({ place });
        if (place !== this.#library.place) this.#move();
      },
      copyHere: !this.#serverKeeps ? null : () => void this.#try(() => this.#copyHere()),
      logOut: key()
        ? () => {
            this.#asking.stopAll();
            forgetKey();
            location.hash = "#/";
            location.reload();
          }
        : null,
    });
  }

  #setTheme(theme: Preferences["theme"]): void {
    this.#remember({ theme });
    applyTheme(theme);
    this.#sidebar.showTheme(theme);
  }

  /** Go on with the conversations of the other place. */
  #move(): void {
    this.#useLibrary(this.#preferences.place);
    this.fresh();
    this.#show(this.#fresh());
    void this.#list();
  }

  #useLibrary(place: Preferences["place"]): void {
    this.#library.leave();
    this.#library.close();
    this.#library = this.#newLibrary(place);
  }

  async #copyHere(): Promise<void> {
    const other = this.#library.place === "server" ? new BrowserStore() : new ServerStore();
    const num = await copyAll(other, this.#library);
    this.#banners.show(
      "notice",
      num === 1 ? "1 chat was copied" : `${num} chats were copied`,
      undefined,
      UNDO_MS,
    );
  }

  #remember(preferences: Partial<Preferences>): void {
    this.#preferences = { ...this.#preferences, ...preferences };
    writePreferences(this.#preferences);
  }

  #draftId(): string {
    const { id, messages } = this.#current.conversation;
    return messages.length > 0 ? id : NEW;
  }
}
