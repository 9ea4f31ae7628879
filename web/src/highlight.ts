/** Colours for code: highlight.js, and of its languages the one that is needed, fetched when it is. */

import DOMPurify from "dompurify";
import type { HLJSApi, LanguageFn } from "highlight.js";

/** Longer code stays as it is: colours are not worth a frozen page. */
const MAX_CHARS = 60_000;

const LANGUAGES: Record<string, () => Promise<{ default: LanguageFn }>> = {
  bash: () => import("highlight.js/lib/languages/bash"),
  c: () => import("highlight.js/lib/languages/c"),
  cpp: () => import("highlight.js/lib/languages/cpp"),
  css: () => import("highlight.js/lib/languages/css"),
  diff: () => import("highlight.js/lib/languages/diff"),
  go: () => import("highlight.js/lib/languages/go"),
  java: () => import("highlight.js/lib/languages/java"),
  javascript: () => import("highlight.js/lib/languages/javascript"),
  json: () => import("highlight.js/lib/languages/json"),
  python: () => import("highlight.js/lib/languages/python"),
  rust: () => import("highlight.js/lib/languages/rust"),
  sql: () => import("highlight.js/lib/languages/sql"),
  typescript: () => import("highlight.js/lib/languages/typescript"),
  xml: () => import("highlight.js/lib/languages/xml"),
  yaml: () => import("highlight.js/lib/languages/yaml"),
};

const ALIASES: Record<string, string> = {
  sh: "bash",
  shell: "bash",
  zsh: "bash",
  console: "bash",
  h: "c",
  "c++": "cpp",
  cc: "cpp",
  hpp: "cpp",
  patch: "diff",
  golang: "go",
  js: "javascript",
  jsx: "javascript",
  mjs: "javascript",
  jsonc: "json",
  py: "python",
  python3: "python",
  rs: "rust",
  ts: "typescript",
  tsx: "typescript",
  html: "xml",
  svg: "xml",
  yml: "yaml",
};

let core: Promise<HLJSApi> | undefined;
const ready = new Map<string, Promise<HLJSApi>>();

export function languageOf(name: string): string | undefined {
  const lower = name.toLowerCase();
  const known = ALIASES[lower] ?? lower;
  return Object.hasOwn(LANGUAGES, known) ? known : undefined;
}

/** Colour the text of an element, unless it has another by then. */
export async function highlight(element: HTMLElement, name: string, text: string): Promise<void> {
  const language = languageOf(name);
  if (!language || text.length > MAX_CHARS) return;
  let highlighter: HLJSApi;
  try {
    highlighter = await highlighterFor(language);
  } catch {
    // a server that is gone: the code stands there without colours
    ready.delete(language);
    core = undefined;
    return;
  }
  if (element.textContent !== text) return;
  const html = highlighter.highlight(text, { language, ignoreIllegals: true }).value;
  element.replaceChildren(
    DOMPurify.sanitize(html, {
      ALLOWED_TAGS: ["span"],
      ALLOWED_ATTR: ["class"],
      RETURN_DOM_FRAGMENT: true,
    }),
  );
}

function highlighterFor(language: string): Promise<HLJSApi> {
  let found = ready.get(language);
  if (!found) {
    found = load(language);
    ready.set(language, found);
  }
  return found;
}

async function load(language: string): Promise<HLJSApi> {
  core ??= import("highlight.js/lib/core").then((module) => module.default);
  const [highlighter, grammar] = await Promise.all([core, LANGUAGES[language]?.()]);
  if (grammar) highlighter.registerLanguage(language, grammar.default);
  return highlighter;
}
