/** Numbers in words: bytes, seconds, rates, shares. What is no number is a dash. */

export function bytes(value: unknown): string {
  const number = amount(value);
  if (!number) return "–";
  for (const [unit, size] of [
    ["TB", 1e12],
    ["GB", 1e9],
    ["MB", 1e6],
  ] as const) {
    if (number >= size) return `${(number / size).toFixed(1)} ${unit}`;
  }
  return `${(number / 1e3).toFixed(0)} kB`;
}

export function seconds(value: unknown): string {
  const number = amount(value);
  if (number === undefined) return "–";
  if (number < 1) return `${Number((number * 1e3).toPrecision(3))} ms`;
  if (number < 120) return `${number.toFixed(1)} s`;
  if (number < 7200) return `${(number / 60).toFixed(0)} min`;
  return number < 172_800 ? `${(number / 3600).toFixed(1)} h` : `${(number / 86_400).toFixed(1)} d`;
}

export function rate(value: unknown): string {
  const number = amount(value);
  if (number === undefined) return "–";
  return number < 1000 ? number.toFixed(1) : Math.round(number).toLocaleString("en");
}

export function whole(value: unknown): string {
  const number = amount(value);
  return number === undefined ? "–" : Math.round(number).toLocaleString("en");
}

export function percent(share: number): string {
  return `${Math.round(100 * Math.min(1, Math.max(0, share)))} %`;
}

/** A finite number that is not below zero. */
export function amount(value: unknown): number | undefined {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : undefined;
}

export function word(value: unknown): string {
  return typeof value === "string" && value ? value : "–";
}
