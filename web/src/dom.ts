/** Elements in one expression. No HTML text is ever parsed here. */

type Child = Node | string | null | undefined | false;

interface Options {
  class?: string | undefined;
  [attribute: string]: unknown;
}

/** `on…` are listeners, true and false are attributes that are there or not. */
export function el<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  options: Options = {},
  ...children: Child[]
): HTMLElementTagNameMap[Tag] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value as EventListener);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...(children.filter((child) => child || child === "") as (Node | string)[]));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** Paths on a grid of 24, drawn with strokes. */
const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  redo: "M20 12a8 8 0 1 1-2.5-5.8M20 3v4.5h-4.5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  play: "M8 6l10 6-10 6z",
  left: "M15 6l-6 6 6 6",
  right: "M9 6l6 6-6 6",
  down: "M6 10l6 6 6-6M12 4v12",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 6v4M9 14v4",
  columns: "M4 5h16v14H4zM12 5v14",
  clip: "M19 11.5l-7 7a4.6 4.6 0 0 1-6.5-6.5l7.5-7.5a3 3 0 0 1 4.3 4.3l-7.3 7.3a1.5 1.5 0 0 1-2.1-2.1l6.6-6.7",
  more: "M5 11h2v2h-2zM11 11h2v2h-2zM17 11h2v2h-2z",
  gear: "M12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM10.6 3h2.8l.5 2.3 1.6.7 2-1.3 2 2-1.3 2 .7 1.6 2.1.5v2.8l-2.1.5-.7 1.6 1.3 2-2 2-2-1.3-1.6.7-.5 2.1h-2.8l-.5-2.1-1.6-.7-2 1.3-2-2 1.3-2-.7-1.6-2.1-.5v-2.8l2.1-.5.7-1.6-1.3-2 2-2 2 1.3 1.6-.7z",
  moon: "M19.5 14A8 8 0 0 1 10 4.5a8 8 0 1 0 9.5 9.5z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1.1 1.1M17.3 17.3l1.1 1.1M5.6 18.4l1.1-1.1M17.3 6.7l1.1-1.1",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zM12 4v16M12 8h6.5M12 12h8M12 16h6.5",
  close: "M6 6l12 12M18 6L6 18",
  search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM15.5 15.5L20 20",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
  pulse: "M3 12h4l3-7 4 14 3-7h4",
  import: "M12 4v11M7.5 10.5L12 15l4.5-4.5M5 19h14",
  keyboard: "M3 7h18v11H3zM7 11h.01M11 11h.01M15 11h.01M17.5 11h.01M8 14.5h8",
  key: "M14.5 4a5 5 0 0 0-4.8 6.4L4 16v4h4v-2.5h2.5V15l1.2-1.2A5 5 0 1 0 14.5 4zM16 8h.01",
} as const;

export type Icon = keyof typeof ICONS;

export function icon(name: Icon): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  for (const [attribute, value] of Object.entries({
    viewBox: "0 0 24 24",
    "aria-hidden": "true",
    class: "icon",
  })) {
    svg.setAttribute(attribute, value);
  }
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon and says a word: to eyes on hover, to screen readers always. */
export function iconButton(
  name: Icon,
  label: string,
  onclick: (event: MouseEvent) => void,
  options: Options = {},
): HTMLButtonElement {
  const { class: extra, ...rest } = options;
  return el(
    "button",
    {
      type: "button",
      title: label,
      "aria-label": label,
      onclick,
      class: `icon-button ${extra ?? ""}`.trim(),
      ...rest,
    },
    icon(name),
  );
}

/** Put a text on the clipboard, also where the page has no right to the modern way. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "off-screen", readonly: true });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    if (focused instanceof HTMLElement) focused.focus();
    return isCopied;
  }
}

/** A button that copies and says for a moment that it has. */
export function copyButton(label: string, text: () => string): HTMLButtonElement {
  const button = iconButton("copy", label, async () => {
    const isCopied = await copyText(text());
    button.replaceChildren(icon(isCopied ? "check" : "close"));
    button.setAttribute("aria-label", isCopied ? "Copied" : "Not copied: the browser forbids it");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  });
  return button;
}

export function download(name: string, type: string, content: string): void {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
