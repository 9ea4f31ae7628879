/** Looks at the server every two seconds while the page is seen, and passes orders on. */

import "../theme.css";
import "./status.css";
import { ApiError } from "../api";
import { askKey } from "../dialogs";
import { keepKey } from "../key";
import { applyTheme, readPreferences } from "../preferences";
import { confirmed } from "../confirm";
import { type Deed, order, readStatus } from "./status";
import { View } from "./view";

const INTERVAL_MS = 2000;
const PATIENCE_MS = 10_000;
const QUESTIONS: Record<Deed, ((name: string) => string) | null> = {
  drain: (name) => `Let ${name} finish and take nothing more? Its worker ends or waits then.`,
  unload: (name) => `Unload ${name}? Its answers end first.`,
  load: null,
};

const LABELS: Record<Deed, string> = { drain: "Drain", load: "Load", unload: "Unload" };

applyTheme(readPreferences().theme);

const parent = document.getElementById("status");
if (!parent) throw new Error("the page has no place for the status");

const view = new View(parent, (deed, name, shown) => void ordered(deed, name, shown));
let timer: ReturnType<typeof setTimeout> | undefined;
let isLooking = false;
let isAsking = false;
let hasRefusedKey = false;

async function look(): Promise<void> {
  if (isLooking || document.hidden) return;
  isLooking = true;
  clearTimeout(timer);
  try {
    view.show(await readStatus(AbortSignal.timeout(PATIENCE_MS)));
  } catch (error) {
    view.complain(words(error));
    if (isUnauthorized(error) && !hasRefusedKey) void logIn(words(error));
  } finally {
    isLooking = false;
    timer = setTimeout(() => void look(), INTERVAL_MS);
  }
}

async function ordered(deed: Deed, name: string, shown: string): Promise<void> {
  const question = QUESTIONS[deed];
  if (question && !(await confirmed(question(shown), LABELS[deed]))) return;
  for (;;) {
    try {
      await order(deed, name);
      view.tell("");
      await look();
      return;
    } catch (error) {
      if (!isUnauthorized(error)) {
        view.tell(words(error));
        return;
      }
      if (!(await logIn(words(error)))) return;
    }
  }
}

/** Whether a key was given. */
async function logIn(reason: string): Promise<boolean> {
  if (isAsking) return false;
  isAsking = true;
  const given = await askKey(reason);
  isAsking = false;
  hasRefusedKey = !given;
  if (!given) return false;
  keepKey(given.key, given.isRemembered);
  void look();
  return true;
}

function isUnauthorized(error: unknown): boolean {
  return error instanceof ApiError && error.status === 401;
}

function words(error: unknown): string {
  if (error instanceof ApiError) return error.message;
  if (error instanceof DOMException && error.name === "TimeoutError") {
    return "the server does not answer";
  }
  return error instanceof Error ? error.message : "the server does not answer";
}

document.addEventListener("visibilitychange", () => void look());
void look();
