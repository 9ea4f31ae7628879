/** What the user set for this browser, and drafts: small things in localStorage. */

import type { Sampling } from "./conversation";
import { readSampling } from "./reading";

export interface Preferences {
  theme: "system" | "light" | "dark";
  /** where conversations are kept */
  place: "server" | "browser";
  /** what the last conversation asked of */
  models: string[];
  system: string;
  sampling: Sampling;
}

const NAME = "chatserve.preferences";
const DRAFT = "chatserve.draft.";
const MAX_DRAFT_CHARS = 200_000;

export function readPreferences(): Preferences {
  let given: Partial<Preferences> = {};
  try {
    given = JSON.parse(localStorage.getItem(NAME) ?? "{}");
  } catch {
    // nothing is kept here, or something else wrote it
  }
  return {
    theme: given.theme === "light" || given.theme === "dark" ? given.theme : "system",
    place: given.place === "browser" ? "browser" : "server",
    models: Array.isArray(given.models)
      ? given.models.filter((each) => typeof each === "string")
      : [],
    system: typeof given.system === "string" ? given.system : "",
    sampling: readSampling(given.sampling),
  };
}

export function writePreferences(preferences: Preferences): void {
  write(NAME, JSON.stringify(preferences));
}

export function applyTheme(theme: Preferences["theme"]): void {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

export function readDraft(id: string): string {
  try {
    return localStorage.getItem(DRAFT + id) ?? "";
  } catch {
    return "";
  }
}

export function writeDraft(id: string, text: string): void {
  // of one that is too long what was kept before is more than nothing
  if (text.length <= MAX_DRAFT_CHARS) write(DRAFT + id, text);
}

export function forgetDrafts(): void {
  try {
    for (const name of Object.keys(localStorage)) {
      if (name.startsWith(DRAFT)) localStorage.removeItem(name);
    }
  } catch {
    // nothing is kept here
  }
}

/** What tells of the one who was here; how the page looks stays. */
export function forgetPersonal(): void {
  writePreferences({ ...readPreferences(), models: [], system: "", sampling: {} });
}

function write(name: string, value: string): void {
  try {
    if (value === "") localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // full or forbidden: it lasts as long as the page
  }
}
