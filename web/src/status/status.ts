/** What `/admin/status` says, and what can be asked of a server. Any field may be missing. */

import { getJson, record, request } from "../api";

export interface Status {
  server: Record<string, unknown>;
  queue: Record<string, unknown>;
  tokens: { now: unknown; stepS: number; history: number[] };
  workers: Record<string, unknown>[];
  models: Record<string, unknown>[];
  errors: Record<string, unknown>[];
}

export async function readStatus(signal?: AbortSignal): Promise<Status> {
  return statusOf(await getJson("/admin/status", signal ? { signal } : {}));
}

export function statusOf(given: unknown): Status {
  const body = record(given);
  const tokens = record(body.tokens_per_s);
  const history = Array.isArray(tokens.history) ? tokens.history : [];
  return {
    server: record(body.server),
    queue: record(body.queue),
    tokens: {
      now: tokens.now,
      stepS: typeof tokens.step_s === "number" ? tokens.step_s : 2,
      history: history.filter((each) => Number.isFinite(each) && each >= 0),
    },
    workers: rows(body.workers),
    models: rows(body.models),
    errors: rows(body.errors),
  };
}

export type Deed = "drain" | "load" | "unload";

/** Rejects with an `ApiError`. */
export async function order(deed: Deed, name: string): Promise<void> {
  const [path, body] =
    deed === "drain"
      ? ["/admin/workers/drain", { id: name }]
      : [`/admin/models/${deed}`, { model: name, wait: false }];
  await request(path as string, { method: "POST", body: JSON.stringify(body) });
}

function rows(value: unknown): Record<string, unknown>[] {
  return Array.isArray(value) ? value.map(record) : [];
}
