/** Whether the server is there and what it serves; asks again by itself. Knows no DOM. */

import { ApiError, isAbort, type Model, models } from "./api";

const LOADING_MS = 1000;
const GONE_MS = [1000, 2000, 4000, 8000];
const CALM_MS = 15_000;

export interface WatchListener {
  models(models: Model[]): void;
  /** null: it answers again. */
  gone(error: ApiError | null): void;
  needsKey(error: ApiError): Promise<boolean>;
}

export class ServerWatch {
  models: Model[] = [];
  isGone = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #numFailures = 0;
  #isAsking = false;

  constructor(private readonly listener: WatchListener) {
    addEventListener("online", () => void this.ask());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) void this.ask();
    });
  }

  /** Ask now, and again later: soon while something loads or the server is gone. */
  async ask(): Promise<void> {
    if (this.#isAsking) return;
    this.#isAsking = true;
    clearTimeout(this.#timer);
    let pauseMs = CALM_MS;
    try {
      this.models = await models();
      this.#numFailures = 0;
      if (this.isGone) {
        this.isGone = false;
        this.listener.gone(null);
      }
      this.listener.models(this.models);
      if (this.models.some((model) => isOnItsWay(model)) || this.models.length === 0) {
        pauseMs = LOADING_MS;
      }
    } catch (failure) {
      pauseMs = GONE_MS[Math.min(this.#numFailures, GONE_MS.length - 1)] ?? CALM_MS;
      this.#numFailures += 1;
      if (failure instanceof ApiError && failure.status === 401) {
        this.#isAsking = false;
        if (await this.listener.needsKey(failure)) void this.ask();
        return;
      }
      if (failure instanceof ApiError && !isAbort(failure)) {
        this.isGone = true;
        this.listener.gone(failure);
      }
    } finally {
      this.#isAsking = false;
    }
    this.#timer = setTimeout(() => void this.ask(), document.hidden ? CALM_MS : pauseMs);
  }
}

/** It will be there without anybody doing anything. */
export function isOnItsWay(model: Model): boolean {
  return !["ready", "unloaded", "failed"].includes(model.state);
}
