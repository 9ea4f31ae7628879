/** A conversation as a file. Pure. */

import { type Conversation, fullText, path } from "./conversation";

export function toJson(conversation: Conversation): string {
  return `${JSON.stringify(conversation, null, 2)}\n`;
}

/** What is shown of it, for people to read. */
export function toMarkdown(conversation: Conversation): string {
  const parts = [`# ${conversation.title || "Untitled"}`];
  if (conversation.system !== "") parts.push(`**System**\n\n${conversation.system}`);
  for (const [side, model] of conversation.models.entries()) {
    if (conversation.models.length > 1) parts.push(`## ${model}`);
    for (const message of path(conversation, side)) {
      const who = message.role === "user" ? "You" : (message.model ?? "Assistant");
      const end = message.partial ? "\n\n*(not whole)*" : "";
      parts.push(`**${who}**\n\n${fullText(message)}${end}`);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

/** A name that every file system takes. */
export function fileName(conversation: Conversation, extension: string): string {
  const words = conversation.title
    .normalize("NFKC")
    .replace(/[^\p{L}\p{N} _-]+/gu, " ")
    .trim()
    .replace(/\s+/g, "-");
  return `${Array.from(words).slice(0, 60).join("") || "chat"}.${extension}`;
}
