/** A small menu beside a button: arrows, Enter, Esc. */

import { el } from "./dom";

export interface MenuItem {
  label: string;
  run(): void;
  isDangerous?: boolean;
}

let close: (() => void) | undefined;

export function openMenu(button: HTMLElement, items: MenuItem[]): void {
  close?.();
  const menu = el(
    "div",
    { class: "menu", role: "menu" },
    ...items.map(({ label, run, isDangerous }) =>
      el(
        "button",
        {
          type: "button",
          role: "menuitem",
          tabindex: -1,
          class: isDangerous ? "dangerous" : undefined,
          onclick: () => {
            shut();
            run();
          },
        },
        label,
      ),
    ),
  );
  const entries = [...menu.querySelectorAll("button")];
  const shut = () => {
    close = undefined;
    menu.remove();
    button.setAttribute("aria-expanded", "false");
    document.removeEventListener("pointerdown", outside, true);
    if (button.isConnected) button.focus();
  };
  const outside = (event: Event) => {
    if (!menu.contains(event.target as Node)) shut();
  };
  menu.addEventListener("keydown", (event) => {
    const at = entries.indexOf(document.activeElement as HTMLButtonElement);
    const steps: Record<string, number> = {
      ArrowDown: at + 1,
      ArrowUp: at - 1 + entries.length,
      Home: 0,
      End: entries.length - 1,
    };
    const next = steps[event.key];
    if (next !== undefined) entries[next % entries.length]?.focus();
    else if (event.key === "Escape" || event.key === "Tab") shut();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  close = shut;
  document.addEventListener("pointerdown", outside, true);
  // in its landmark, so that whoever lists those finds it
  (button.closest("nav, main") ?? document.body).append(menu);
  const place = button.getBoundingClientRect();
  const left = Math.min(place.left, window.innerWidth - menu.offsetWidth - 8);
  const below = place.bottom + 4;
  const isBelow = below + menu.offsetHeight < window.innerHeight;
  menu.style.left = `${Math.max(8, left)}px`;
  menu.style.top = `${isBelow ? below : Math.max(8, place.top - menu.offsetHeight - 4)}px`;
  button.setAttribute("aria-haspopup", "menu");
  button.setAttribute("aria-expanded", "true");
  entries[0]?.focus();
}
