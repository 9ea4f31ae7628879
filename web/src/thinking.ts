/** What a model writes to itself before it answers, told apart from the answer. Pure. */

const OPEN = "<think>";
const CLOSE = "</think>";

export interface Thoughts {
  /** undefined: it does not think aloud */
  thinking: string | undefined;
  answer: string;
}

export function thoughtsOf(text: string): Thoughts {
  const start = text.trimStart();
  // the mark itself may still be coming
  if (start.length < OPEN.length && start !== "" && OPEN.startsWith(start)) {
    return { thinking: undefined, answer: "" };
  }
  if (!start.startsWith(OPEN)) return { thinking: undefined, answer: text };
  const rest = start.slice(OPEN.length);
  const end = rest.indexOf(CLOSE);
  if (end >= 0) {
    return {
      thinking: rest.slice(0, end).trimStart(),
      answer: rest.slice(end + CLOSE.length).trimStart(),
    };
  }
  return { thinking: withoutBeginning(rest).trimStart(), answer: "" };
}

/** Without what may become the mark of its end. */
function withoutBeginning(text: string): string {
  const last = text.lastIndexOf("<");
  return last >= 0 && CLOSE.startsWith(text.slice(last)) ? text.slice(0, last) : text;
}
