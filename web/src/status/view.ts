/** The page `/status`: rows that are kept from one look to the next, so that focus stays. */

import { el } from "../dom";
import { record } from "../api";
import { Sparkline } from "./sparkline";
import type { Deed, Status } from "./status";
import { amount, bytes, percent, rate, seconds, whole, word } from "./words";

export type Order = (deed: Deed, name: string, shown: string) => void;

/** Terms and what they are now, in a list that is made once. */
class Facts {
  readonly element = el("dl", { class: "facts" });
  readonly #values = new Map<string, HTMLElement>();

  set(term: string, value: string): void {
    let there = this.#values.get(term);
    if (!there) {
      there = el("dd", { dir: "auto" });
      this.#values.set(term, there);
      const isWide = term.includes("p99");
      this.element.append(
        el("div", { class: isWide ? "wide" : undefined }, el("dt", {}, term), there),
      );
    }
    if (there.textContent !== value) there.textContent = value;
  }
}

/** A share as a bar, with words beside it. */
class Gauge {
  readonly #bar = el("meter", { min: "0", max: "1", high: "0.9", optimum: "0" });
  readonly #words = el("span", { class: "gauge-words" });
  readonly element: HTMLElement;

  constructor(readonly label: string) {
    this.#bar.setAttribute("aria-label", label);
    this.element = el(
      "div",
      { class: "gauge" },
      el("span", { class: "gauge-label" }, label),
      this.#bar,
      this.#words,
    );
  }

  set(used: unknown, total: unknown, show: (value: unknown) => string): void {
    const [part, all] = [amount(used) ?? 0, amount(total)];
    this.element.hidden = !all;
    if (!all) return;
    const share = Math.min(1, part / all);
    this.#bar.value = share;
    this.#words.textContent = `${percent(share)} of ${show(all)}`;
  }
}

class WorkerCard {
  readonly #title = el("h3", { dir: "auto" });
  readonly #state = el("span", { class: "state" });
  readonly #facts = new Facts();
  readonly #kv = new Gauge("Keys and values");
  readonly #memory = new Gauge("Device memory");
  readonly #loading = new Gauge("Weights read");
  readonly #drain: HTMLButtonElement;
  readonly element: HTMLElement;

  constructor(id: string, order: Order) {
    this.#drain = el(
      "button",
      {
        type: "button",
        class: "dangerous",
        onclick: () => order("drain", id, this.#title.textContent ?? ""),
      },
      "Drain",
    );
    this.element = el(
      "article",
      { class: "card" },
      el("header", { class: "row" }, this.#title, this.#state),
      this.#loading.element,
      this.#memory.element,
      this.#kv.element,
      this.#facts.element,
      el("div", { class: "row" }, this.#drain),
    );
  }

  update(row: Record<string, unknown>): void {
    const names = Array.isArray(row.models) ? row.models.map(word) : [];
    const number = amount(row.number) ?? 0;
    const title = `${names[0] ?? "–"}${number ? ` (${number + 1})` : ""}`;
    if (this.#title.textContent !== title) this.#title.textContent = title;
    this.#drain.setAttribute("aria-label", `Drain ${title}`);
    this.#drain.disabled = row.state === "draining";
    showState(this.#state, row.state);
    const isLoading = row.state === "loading";
    this.#loading.set(row.loaded_bytes, isLoading ? row.total_bytes : 0, bytes);
    this.#memory.set(row.device_used_bytes, row.device_total_bytes, bytes);
    this.#kv.set(row.kv_used_tokens, row.kv_total_tokens, (all) => `${whole(all)} tokens`);
    const facts: [string, string][] = [
      ["Device", word(row.device)],
      ["Process memory", bytes(row.rss_bytes)],
      ["Running", whole(row.running)],
      ["Waiting", whole(row.waiting)],
      ["Tokens/s", rate(row.tokens_per_s)],
      ["Prompt tokens/s", rate(row.prompt_tokens_per_s)],
      ["First token, p50 / p90 / p99", percentiles(row.ttft_s)],
      ["Between tokens, p50 / p90 / p99", percentiles(row.itl_s)],
      ["Expected wait", seconds(row.wait_s)],
      ["Starts", whole(row.num_starts)],
      ["Address", word(row.address)],
    ];
    for (const [term, value] of facts) this.#facts.set(term, value);
  }
}

class ModelRow {
  readonly #cells = Array.from({ length: 4 }, () => el("td", { dir: "auto" }));
  readonly #name = el("th", { scope: "row", dir: "auto" });
  readonly #state = el("span", { class: "state" });
  readonly #button: HTMLButtonElement;
  #deed: Deed = "load";
  readonly element: HTMLElement;

  constructor(name: string, order: Order) {
    this.#button = el("button", { type: "button", onclick: () => order(this.#deed, name, name) });
    this.#name.textContent = name;
    const [state, size, device, button] = this.#cells;
    state?.append(this.#state);
    button?.append(this.#button);
    this.element = el("tr", {}, this.#name, state, size, device, button);
  }

  update(row: Record<string, unknown>): void {
    const state = word(row.state);
    showState(this.#state, state);
    const size = bytes(row.memory_bytes ?? row.bytes ?? row.total_bytes);
    if (this.#cells[1]) this.#cells[1].textContent = size;
    if (this.#cells[2]) this.#cells[2].textContent = word(row.device);
    this.#deed = ["unloaded", "failed"].includes(state) ? "load" : "unload";
    const label = this.#deed === "load" ? "Load" : "Unload";
    if (this.#button.textContent !== label) this.#button.textContent = label;
    this.#button.setAttribute("aria-label", `${label} ${word(row.name)}`);
    this.#button.disabled = ["draining", "unloading", "starting", "loading"].includes(state);
  }
}

/** Rows by name, in the order of the latest look. */
class Rows<Row extends { element: HTMLElement; update(row: Record<string, unknown>): void }> {
  readonly #rows = new Map<string, Row>();

  constructor(
    readonly parent: HTMLElement,
    readonly field: string,
    readonly make: (name: string) => Row,
  ) {}

  update(given: Record<string, unknown>[]): void {
    const names = new Set<string>();
    for (const row of given) {
      const name = word(row[this.field]);
      if (names.has(name)) continue;
      names.add(name);
      let there = this.#rows.get(name);
      if (!there) {
        there = this.make(name);
        this.#rows.set(name, there);
        this.parent.append(there.element);
      }
      there.update(row);
    }
    for (const [name, row] of this.#rows) {
      if (names.has(name)) continue;
      row.element.remove();
      this.#rows.delete(name);
    }
  }
}

export class View {
  readonly #facts = new Facts();
  readonly #sparkline = new Sparkline();
  readonly #rate = el("strong", { class: "big" });
  readonly #notice = el("p", { class: "trouble", role: "alert", hidden: true, dir: "auto" });
  readonly #trouble = el("p", { class: "trouble", role: "alert", hidden: true, dir: "auto" });
  readonly #noWorkers = el("p", { hidden: true }, "No worker is there.");
  readonly #cards = el("div", { class: "cards" });
  readonly #modelBody = el("tbody");
  readonly #errorBody = el("tbody");
  readonly #errorTable: HTMLElement;
  readonly #noErrors = el("p", {}, "None.");
  readonly #workers: Rows<WorkerCard>;
  readonly #models: Rows<ModelRow>;
  readonly #main: HTMLElement;

  constructor(parent: HTMLElement, order: Order) {
    this.#workers = new Rows(this.#cards, "id", (id) => new WorkerCard(id, order));
    this.#models = new Rows(this.#modelBody, "name", (name) => new ModelRow(name, order));
    this.#errorTable = table(
      "Recent errors",
      ["When", "Code", "Times", "Model", "Message"],
      this.#errorBody,
    );
    this.#main = el(
      "main",
      {},
      section(
        "Now",
        el("div", { class: "now" }, el("p", {}, this.#rate, " tokens/s"), this.#sparkline.element),
        this.#facts.element,
      ),
      section("Workers", this.#noWorkers, this.#cards),
      section("Models", table("Models", ["Name", "State", "Size", "Device", ""], this.#modelBody)),
      section("Recent errors", this.#noErrors, this.#errorTable),
    );
    parent.append(
      el("header", { class: "top" }, el("h1", {}, "Status"), el("a", { href: "/" }, "Chat")),
      this.#trouble,
      this.#notice,
      this.#main,
    );
  }

  show(status: Status): void {
    this.#trouble.hidden = true;
    this.#main.classList.remove("stale");
    const { server, queue, tokens } = status;
    const now = rate(tokens.now);
    if (this.#rate.textContent !== now) this.#rate.textContent = now;
    const minutes = Math.max(1, Math.round((tokens.history.length * tokens.stepS) / 60));
    this.#sparkline.update(
      tokens.history,
      `Tokens a second over the last ${minutes} min: now ${now}, at most ` +
        rate(Math.max(0, ...tokens.history)),
    );
    this.#facts.set("Running", whole(queue.running));
    this.#facts.set("Waiting", whole(queue.waiting));
    this.#facts.set("Expected wait", seconds(queue.wait_s));
    this.#facts.set("Up for", seconds(server.uptime_s));
    this.#facts.set("State", server.draining === true ? "draining" : "serving");
    this.#facts.set("Version", word(server.version));
    this.#noWorkers.hidden = status.workers.length > 0;
    this.#workers.update(status.workers);
    this.#models.update(status.models);
    this.#noErrors.hidden = status.errors.length > 0;
    this.#errorTable.hidden = status.errors.length === 0;
    this.#errorBody.replaceChildren(...status.errors.map(errorRow));
  }

  /** What became of an order; nothing where that can be seen. */
  tell(words: string): void {
    this.#notice.textContent = words;
    this.#notice.hidden = !words;
  }

  /** What is shown may be old. */
  complain(words: string): void {
    this.#main.classList.add("stale");
    if (this.#trouble.textContent !== words) this.#trouble.textContent = words;
    this.#trouble.hidden = false;
  }
}

function section(title: string, ...content: Node[]): HTMLElement {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), ...content);
}

function table(label: string, headings: string[], body: HTMLElement): HTMLElement {
  return el(
    "div",
    { class: "scroll", role: "region", "aria-label": label, tabindex: "0" },
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ...headings.map((each) =>
            each
              ? el("th", { scope: "col" }, each)
              : el("td", {}, el("span", { class: "off-screen" }, "Actions")),
          ),
        ),
      ),
      body,
    ),
  );
}

function errorRow(row: Record<string, unknown>): HTMLElement {
  const at = amount(row.time);
  const when = at === undefined ? "–" : new Date(at * 1000);
  const shown =
    when instanceof Date
      ? el("time", { datetime: when.toISOString() }, when.toLocaleTimeString())
      : when;
  return el(
    "tr",
    {},
    el("td", {}, shown),
    el("td", {}, el("code", {}, word(row.code))),
    el("td", {}, whole(row.count)),
    el("td", { dir: "auto" }, word(row.model)),
    el("td", { dir: "auto" }, word(row.message)),
  );
}

function showState(element: HTMLElement, state: unknown): void {
  const shown = word(state);
  if (element.textContent === shown) return;
  element.textContent = shown;
  element.dataset.state = shown;
}

function percentiles(value: unknown): string {
  const { p50, p90, p99 } = record(value);
  return amount(p50) === undefined ? "–" : [p50, p90, p99].map(seconds).join(" / ");
}
