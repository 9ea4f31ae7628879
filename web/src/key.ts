/** The API key that the user typed: for this tab, or for good where that was asked for. */

const NAME = "chatserve.key";

function storages(): Storage[] {
  try {
    return [sessionStorage, localStorage];
  } catch {
    // a browser that keeps nothing for this page
    return [];
  }
}

let inMemory = "";

export function key(): string {
  for (const storage of storages()) {
    const value = storage.getItem(NAME);
    if (value) return value;
  }
  return inMemory;
}

export function keepKey(value: string, isRemembered: boolean): void {
  inMemory = value;
  const [session, local] = storages();
  const [wanted, other] = isRemembered ? [local, session] : [session, local];
  try {
    // first: other tabs that share it are never without one
    wanted?.setItem(NAME, value);
  } catch {
    // full or forbidden: it lasts as long as the page
    wanted?.removeItem(NAME);
  }
  other?.removeItem(NAME);
}

export function forgetKey(): void {
  inMemory = "";
  for (const storage of storages()) storage.removeItem(NAME);
}

/** The name of something that this browser keeps, apart for each key. */
export function owned(name: string): string {
  const value = key();
  return value === "" ? name : `${name}-${mark(value)}`;
}

/** FNV-1a in 32 bits: enough to keep keys apart, and too little to tell one. */
function mark(value: string): string {
  let hash = 0x811c9dc5;
  for (let at = 0; at < value.length; at++) {
    hash = Math.imul(hash ^ value.charCodeAt(at), 0x01000193);
  }
  return (hash >>> 0).toString(16).padStart(8, "0");
}

/** What no header can hold is no key. */
export function isKey(value: string): boolean {
  return /^[\x21-\x7e]+$/.test(value);
}
