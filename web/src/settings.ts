/** What the user has set for this browser, and the dialog in which that is done. */

import { openSettings } from "./dialogs";
import type { Keeping, Place } from "./keeping";
import { key } from "./key";
import { applyTheme, type Preferences, readPreferences, writePreferences } from "./preferences";

export interface SettingsListener {
  themed(theme: Preferences["theme"]): void;
  /** Chats of another place are wanted. */
  moved(place: Place): void;
  copyHere(): void;
  logOut(): void;
}

export class Settings {
  preferences = readPreferences();

  constructor(private readonly listener: SettingsListener) {
    applyTheme(this.preferences.theme);
  }

  remember(preferences: Partial<Preferences>): void {
    this.preferences = { ...this.preferences, ...preferences };
    writePreferences(this.preferences);
  }

  /** To the next of the system's colours, light, dark. */
  nextTheme(): void {
    const next = { system: "light", light: "dark", dark: "system" } as const;
    this.#setTheme(next[this.preferences.theme]);
  }

  open(keeping: Keeping): void {
    const { serverKeeps } = keeping;
    openSettings({ ...this.preferences, place: keeping.place }, serverKeeps, {
      changed: ({ theme, place }) => {
        this.#setTheme(theme);
        if (serverKeeps) this.remember({ place });
        if (place !== keeping.place) this.listener.moved(place);
      },
      copyHere: serverKeeps ? () => this.listener.copyHere() : null,
      logOut: key() ? () => this.listener.logOut() : null,
    });
  }

  #setTheme(theme: Preferences["theme"]): void {
    this.remember({ theme });
    applyTheme(theme);
    this.listener.themed(theme);
  }
}
