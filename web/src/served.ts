/** Of the models that a server has: which of those wanted are there, and what is shown. Pure. */

import type { Model } from "./api";

/** Those wanted that are served, else the first that is; [""] where nobody knows of any. */
export function served(models: Model[], wanted: string[]): string[] {
  const there = models.filter((model) => model.isForChat);
  if (there.length === 0) return wanted.length > 0 ? wanted : [""];
  const found = wanted.filter((name) => there.some((model) => model.name === name));
  return found.length > 0 ? found : [there[0]?.name ?? ""];
}

/** Two lists with the same of this look the same, but for how far a load is. */
export function look(models: Model[]): string {
  return JSON.stringify(
    models.map(({ name, state, contextLength, isForChat }) => [
      name,
      state,
      contextLength,
      isForChat,
    ]),
  );
}

/** How far the loads are. */
export function progress(models: Model[]): string {
  return JSON.stringify(models.map(({ loadedBytes, totalBytes }) => [loadedBytes, totalBytes]));
}
