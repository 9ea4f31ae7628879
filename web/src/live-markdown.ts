/**
 * Markdown that is still being written: each update costs what is new, not what is there.
 *
 * Blocks that no later line can change are rendered once and left alone; only the last block is
 * made anew. Of a long list the finished items are left alone, too, and code that is not closed yet
 * grows by its new text. What cannot be read as Markdown (quotes thousands deep) is plain text.
 */

import type { Token, Tokens } from "marked";
import { codeFrame } from "./code-block";
import { el } from "./dom";
import { highlight } from "./highlight";
import { lex, render } from "./markdown";

const MAX_LIVE_ITEMS = 12;
const DEFINITION = /^ {0,3}\[[^\]]+\]:/m;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`{,:]*)[^`\n]*\n/;

export class LiveMarkdown {
  #text = "";
  /** up to here the text is settled: its elements stay */
  #settled = 0;
  /** the elements of what is not settled */
  #live: ChildNode[] = [];
  #code: LiveCode | undefined;
  /** the plain text of blocks that have settled since somebody asked */
  #news: string[] = [];
  /** a list is in pieces */
  #isSplit = false;
  #isFinished = false;
  /** all of a text that could not be read as Markdown */
  #plain: Text | undefined;

  constructor(readonly element: HTMLElement) {}

  /** Show this text. What it begins with is expected to be what was shown before. */
  update(text: string): void {
    if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
    if (text === this.#text) return;
    // the last block of what was whole may go on after all
    if (this.#isFinished || !text.startsWith(this.#text)) this.#clear();
    this.#isFinished = false;
    this.#text = text;
    this.#orPlain(() => this.#grow());
  }

  #grow(): void {
    const text = this.#text;
    if (this.#code) {
      const end = this.#code.grow(text);
      if (end === undefined) return;
      this.#news.push("Code.");
      this.#settled = end;
      this.#code = undefined;
      this.#live = [];
    }
    this.#settle();
    this.#renderLive();
  }

  /** The text is whole: nothing is to come. */
  finish(text: string): void {
    this.update(text);
    if (this.#isFinished) return;
    this.#isFinished = true;
    if (this.#isSplit || DEFINITION.test(text)) this.#orPlain(() => this.#renderWhole());
    if (this.#plain) this.#news.push(this.#text.slice(this.#settled));
    this.#code?.finish();
    this.#code = undefined;
    for (const node of this.#live) this.#news.push(node.textContent ?? "");
    this.#live = [];
    this.#settled = this.#text.length;
  }

  /** What has settled since the last call, for a screen reader. */
  takeNews(): string {
    const news = this.#news.join("\n");
    this.#news = [];
    return news.replace(/\n+/g, "\n").trim();
  }

  #clear(): void {
    this.#text = "";
    this.#settled = 0;
    this.#live = [];
    this.#code = undefined;
    this.#news = [];
    this.#isSplit = false;
    this.#plain = undefined;
    this.element.replaceChildren();
  }

  /** Make elements of the text; if that fails, show it as it is. */
  #orPlain(make: () => void): void {
    if (!this.#plain) {
      try {
        make();
        return;
      } catch {
        // quotes in quotes in quotes are too deep for the stack
      }
      this.#code = undefined;
      this.#live = [];
      this.#plain = document.createTextNode("");
      this.element.replaceChildren(el("p", { class: "plain", dir: "auto" }, this.#plain));
    }
    this.#plain.data = this.#text;
  }

  /** What blocks say of each other (a list in pieces, addresses of links) is only known at the end. */
  #renderWhole(): void {
    const fragment = render(lex(this.#text));
    this.#isSplit = false;
    this.#code = undefined;
    this.#live = [];
    this.element.replaceChildren(fragment);
  }

  #settle(): void {
    // a line that is not whole can still become anything
    const end = this.#text.lastIndexOf("\n") + 1;
    if (end <= this.#settled) return;
    const tokens = lex(this.#text.slice(this.#settled, end));
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const done: Token[] = tokens.slice(0, Math.max(last, 0));
    const open = tokens[last];
    if (open?.type === "list") this.#settleItems(done, open as Tokens.List);
    const raw = done.map((token) => token.raw).join("");
    // where marked rewrote the text (tabs), nothing says how far it read
    if (raw === "" || !this.#text.startsWith(raw, this.#settled)) return;
    this.#dropLive();
    const fragment = render(done);
    for (const node of fragment.childNodes) this.#news.push(node.textContent ?? "");
    this.element.append(fragment);
    this.#settled += raw.length;
  }

  /** Move the finished items of a long list to what is done. */
  #settleItems(done: Token[], list: Tokens.List): void {
    if (list.items.length <= MAX_LIVE_ITEMS) return;
    const items = list.items.slice(0, -2);
    done.push({ ...list, items, raw: items.map((item) => item.raw).join("") });
    this.#isSplit = true;
  }

  #renderLive(): void {
    this.#dropLive();
    const rest = this.#text.slice(this.#settled);
    if (rest.trim() === "") return;
    const fence = FENCE.exec(rest);
    if (fence) {
      this.#code = new LiveCode(this.#settled, fence);
      this.element.append(this.#code.element);
      this.#live = [this.#code.element];
      const end = this.#code.grow(this.#text);
      if (end !== undefined) {
        // the whole block came at once
        this.#code = undefined;
        this.#live = [];
        this.#settled = end;
        this.#news.push("Code.");
        this.#settle();
        this.#renderLive();
      }
      return;
    }
    const fragment = render(lex(rest));
    this.#live = [...fragment.childNodes];
    this.element.append(fragment);
  }

  #dropLive(): void {
    for (const node of this.#live) node.remove();
    this.#live = [];
  }
}

/** Code behind an opening fence. */
class LiveCode {
  readonly element: HTMLElement;
  readonly #body = el("code", { dir: "ltr" });
  readonly #lines = document.createTextNode("");
  /** the line that is not whole yet */
  readonly #tail = document.createTextNode("");
  readonly #closing: RegExp;
  readonly #mark: string;
  readonly #language: string;
  /** how far lines have been looked at */
  #at: number;

  constructor(start: number, fence: RegExpExecArray) {
    const mark = fence[1] ?? "```";
    this.#mark = mark[0] ?? "`";
    this.#language = fence[2] ?? "";
    this.#closing = new RegExp(`^ {0,3}${this.#mark}{${mark.length},}[ \\t]*$`);
    this.#at = start + fence[0].length;
    this.#body.append(this.#lines, this.#tail);
    this.element = codeFrame(this.#language, this.#body);
  }

  /** Take the new lines of the whole text; returns where the block ends, if it does. */
  grow(text: string): number | undefined {
    let lines = "";
    let newline = text.indexOf("\n", this.#at);
    for (; newline >= 0; newline = text.indexOf("\n", this.#at)) {
      const line = text.slice(this.#at, newline);
      this.#at = newline + 1;
      if (this.#closing.test(line)) {
        this.#lines.appendData(lines);
        this.#tail.data = "";
        this.finish();
        return this.#at;
      }
      lines += `${line}\n`;
    }
    if (lines !== "") this.#lines.appendData(lines);
    const tail = text.slice(this.#at);
    // what may become the closing fence is not shown as code before that is known
    this.#tail.data = tail.trimStart().startsWith(this.#mark) ? "" : tail;
    return undefined;
  }

  finish(): void {
    const code = (this.#lines.data + this.#tail.data).replace(/\n$/, "");
    this.#body.replaceChildren(code);
    void highlight(this.#body, this.#language, code);
  }
}
