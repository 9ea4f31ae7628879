import { vi } from "vitest";

/** Wait for what comes by itself; how long that takes on a busy machine decides no test. */
export function until(check: () => void): Promise<void> {
  return vi.waitFor(check, { timeout: 30_000, interval: 10 });
}
