/** Conversations that go out to files and come in from them, or from another place. */

import type { Conversation } from "./conversation";
import { download } from "./dom";
import { fileName, toJson, toMarkdown } from "./export";
import type { Library } from "./library";
import { readFile } from "./reading";
import type { Store } from "./store";

export type Form = "markdown" | "json";

export function exportFile(conversation: Conversation, form: Form): void {
  if (form === "json") {
    download(fileName(conversation, "json"), "application/json", toJson(conversation));
  } else {
    download(fileName(conversation, "md"), "text/markdown", toMarkdown(conversation));
  }
}

/** Returns the id of the last one. Rejects with an `Error` that says what is wrong with the file. */
export async function importFile(
  file: File,
  library: Library,
  models: string[],
): Promise<string | undefined> {
  const found = readFile(await file.text(), file.name);
  for (const conversation of found) {
    if (conversation.models.length === 0) conversation.models = models;
    await library.add(conversation);
  }
  return found.at(-1)?.id;
}

/** Take over what another place has and this one has not; returns how many. */
export async function copyAll(from: Store, library: Library): Promise<number> {
  const there = new Set(library.summaries.map(({ id }) => id));
  let num = 0;
  for (const { id } of await from.list("")) {
    const conversation = there.has(id) ? null : await from.get(id);
    if (!conversation) continue;
    await library.add(conversation);
    num += 1;
  }
  return num;
}
