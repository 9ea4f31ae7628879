/**
 * Markdown that a model wrote, as elements: the only way of its text into the page but plain text.
 *
 * marked makes HTML of it, DOMPurify leaves what is listed here, and the rest is done on elements.
 * HTML of the model's own is shown as the text that it is, links say where they lead, and images
 * are never fetched.
 */

import DOMPurify from "dompurify";
import { Marked, type Token, type TokensList } from "marked";
import { codeBlock } from "./code-block";
import { el } from "./dom";

const TAGS = [
  "a",
  "b",
  "blockquote",
  "br",
  "code",
  "del",
  "em",
  "h3",
  "h4",
  "h5",
  "h6",
  "hr",
  "i",
  "kbd",
  "li",
  "ol",
  "p",
  "pre",
  "s",
  "span",
  "strong",
  "sub",
  "sup",
  "table",
  "tbody",
  "td",
  "th",
  "thead",
  "tr",
  "u",
  "ul",
];
const ATTRIBUTES = ["align", "href", "start", "data-language", "data-image"];
const HARMLESS = /^<\/?(?:br|b|i|u|s|em|strong|sub|sup|kbd)\s*\/?>$/i;
const LINKS = /^(?:https?|mailto):/i;
const BLOCKS = "p,h3,h4,h5,h6,li,blockquote,td,th,ul,ol,table";

function escaped(text: string): string {
  return text
    .replace(/&/g, "&amp;")
    .replace(/</g, "&lt;")
    .replace(/>/g, "&gt;")
    .replace(/"/g, "&quot;")
    .replace(/'/g, "&#39;");
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      if (HARMLESS.test(text.trim())) return text;
      return block ? `<p>${escaped(text.trimEnd()).replace(/\n/g, "<br>")}</p>\n` : escaped(text);
    },
    code({ text, lang }) {
      const language = escaped((lang ?? "").split(/[\s{,:]/, 1)[0] ?? "");
      return `<pre data-language="${language}">${escaped(text)}</pre>\n`;
    },
    heading({ tokens, depth }) {
      // the page's own headings are h1 and h2
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>\n`;
    },
    image({ href, text }) {
      return `<span data-image="${escaped(href)}">${escaped(text)}</span>`;
    },
    checkbox({ checked }) {
      return checked ? "☑ " : "☐ ";
    },
  },
});

export function lex(text: string): TokensList {
  return marked.lexer(text);
}

/** The elements of some tokens. */
export function render(tokens: Token[]): DocumentFragment {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ATTRIBUTES,
    ALLOW_ARIA_ATTR: false,
    ALLOW_DATA_ATTR: false,
    ALLOWED_URI_REGEXP: LINKS,
    // without this the expression for links judges every attribute
    ADD_URI_SAFE_ATTR: ["align", "start", "data-language"],
    RETURN_DOM_FRAGMENT: true,
  });
  for (const span of fragment.querySelectorAll("span[data-image]")) span.replaceWith(image(span));
  for (const link of fragment.querySelectorAll("a")) finishLink(link);
  for (const pre of fragment.querySelectorAll("pre")) {
    pre.replaceWith(codeBlock(pre.dataset.language ?? "", pre.textContent ?? ""));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const block of fragment.querySelectorAll(BLOCKS)) block.setAttribute("dir", "auto");
  return fragment;
}

/** An image would tell its host who reads this; what is left is a link to it. */
function image(span: Element): HTMLElement {
  const href = span.getAttribute("data-image") ?? "";
  const label = `image: ${span.textContent || "without a name"}`;
  if (!LINKS.test(href)) return el("span", { class: "image" }, `[${label}]`);
  const link = el("a", { href, class: "image" }, `[${label}]`);
  return link;
}

function finishLink(link: HTMLAnchorElement): void {
  const href = link.getAttribute("href");
  const target = href === null ? undefined : parsed(href);
  if (href === null || !target) {
    link.replaceWith(...link.childNodes);
    return;
  }
  link.title = href;
  link.rel = "noopener noreferrer nofollow";
  link.target = "_blank";
  const where = target.protocol === "mailto:" ? target.pathname : target.host;
  if (link.textContent?.trim() !== href && link.textContent?.trim() !== where) {
    // the text may say anything, this is where it leads
    link.append(el("span", { class: "link-target", dir: "ltr" }, ` (${where})`));
  }
}

function parsed(href: string): URL | undefined {
  try {
    const url = new URL(href);
    return LINKS.test(url.protocol) ? url : undefined;
  } catch {
    return undefined;
  }
}
