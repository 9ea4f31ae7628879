/** All that is seen of the page, and how it is brought to a state. Knows no store, no server. */

import { Announcer } from "./announcer";
import type { Model } from "./api";
import type { Asking } from "./asking";
import { Banners } from "./banner";
import { Composer, type ComposerActions } from "./composer";
import { type Conversation, path, type Sampling } from "./conversation";
import { el } from "./dom";
import { Frame } from "./frame";
import { ModelPicker } from "./model-picker";
import { SamplingPanel } from "./sampling-panel";
import { Sidebar, type SidebarActions } from "./sidebar";
import { type ThreadActions, ThreadView } from "./thread-view";

export interface ScreenActions {
  sidebar: Omit<SidebarActions, "close" | "chosen">;
  thread: ThreadActions;
  composer: Omit<ComposerActions, "editLast">;
  pickModels(models: string[], isBlind: boolean): void;
  sampled(system: string, sampling: Sampling): void;
  /** what stands where nothing has been said */
  welcome(): HTMLElement;
}

export interface ScreenState {
  conversation: Conversation;
  asking: Asking;
  /** ids of messages that another tab writes */
  elsewhere: ReadonlySet<string>;
  tail(side: number): HTMLElement | null;
  models: Model[];
}

export class Screen {
  readonly announcer = new Announcer();
  readonly banners = new Banners();
  readonly sidebar: Sidebar;
  readonly thread: ThreadView;
  readonly composer: Composer;
  readonly picker: ModelPicker;
  readonly panel: SamplingPanel;
  readonly frame: Frame;
  readonly #title = el("h1", { class: "off-screen" });

  constructor(root: HTMLElement, actions: ScreenActions) {
    this.sidebar = new Sidebar({
      ...actions.sidebar,
      close: () => this.frame.showSidebar(false),
      chosen: () => this.frame.chosen(),
    });
    this.thread = new ThreadView(
      actions.thread,
      (news) => this.announcer.say(news),
      actions.welcome,
    );
    this.composer = new Composer({
      ...actions.composer,
      editLast: () => this.thread.editLast(),
    });
    this.picker = new ModelPicker(actions.pickModels);
    this.panel = new SamplingPanel(actions.sampled, () => this.frame.showPanel(false));
    this.frame = new Frame(
      root,
      {
        sidebar: this.sidebar.element,
        title: this.#title,
        picker: this.picker.element,
        banners: this.banners.element,
        thread: this.thread.element,
        toEnd: this.thread.toEnd,
        composer: this.composer.element,
        panel: this.panel.element,
        announcer: this.announcer.element,
      },
      () => this.composer.focus(),
    );
  }

  sync({ conversation, asking, elsewhere, tail, models }: ScreenState): void {
    const { title } = conversation;
    const isBusy = asking.isBusy(conversation);
    this.#title.textContent = title || "New chat";
    document.title = title ? `${title} · chatserve` : "chatserve";
    this.picker.show(conversation, isBusy);
    this.panel.show(conversation);
    this.thread.sync({ conversation, answerings: asking.answerings, elsewhere, tail });
    this.composer.setBusy(isBusy);
    const model = models.find(({ name }) => name === conversation.models[0]);
    const usage = path(conversation).findLast((each) => each.usage)?.usage;
    this.composer.setContext(
      usage && usage.prompt_tokens + usage.completion_tokens,
      model?.contextLength,
    );
  }
}
