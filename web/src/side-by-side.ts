/** Two models beside each other: their names, and who was better. */

import {
  type Conversation,
  type Message,
  now,
  path,
  type Vote,
  type VoteChoice,
} from "./conversation";
import { el } from "./dom";

const CHOICES: [VoteChoice, string][] = [
  ["left", "Left is better"],
  ["right", "Right is better"],
  ["tie", "A tie"],
  ["both_bad", "Both are bad"],
];

export function sideName(side: number): string {
  return side === 0 ? "Model A" : "Model B";
}

/** Names that are hidden stay so until there has been a vote. */
export function areNamesHidden(conversation: Conversation): boolean {
  return Boolean(conversation.is_blind) && Object.keys(conversation.votes ?? {}).length === 0;
}

/** A vote on the answers beside `left`, with all that was said before. */
export function voteOn(conversation: Conversation, left: Message, vote: VoteChoice): Vote {
  const [a = "", b = ""] = conversation.models;
  const until = path(conversation).findIndex((each) => each.id === left.id) + 1;
  const said = (side: number) =>
    path(conversation, side)
      .slice(0, until)
      .map(({ role, content }) => ({ role, content }));
  return {
    conversation_id: conversation.id,
    models: [a, b],
    vote,
    names_hidden: areNamesHidden(conversation),
    messages: [said(0), said(1)],
    voted_at: now(),
  };
}

/** The buttons below the newest pair of answers; below older ones only what was said. */
export function voteBar(
  conversation: Conversation,
  left: Message,
  isLast: boolean,
  vote: (choice: VoteChoice) => void,
): HTMLElement {
  const given = conversation.votes?.[left.id];
  if (given || !isLast) {
    const said = CHOICES.find(([choice]) => choice === given)?.[1];
    return el(
      "p",
      { class: "vote-given", hidden: !said },
      said ? `Your vote: ${said.toLowerCase()}` : "",
    );
  }
  return el(
    "div",
    { class: "vote", role: "group", "aria-label": "Which answer is better?" },
    ...CHOICES.map(([choice, label]) =>
      el("button", { type: "button", onclick: () => vote(choice) }, ...words(choice, label)),
    ),
  );
}

/** Where there is no room beside each other, left stands above right. */
function words(choice: VoteChoice, label: string): (Node | string)[] {
  if (choice !== "left" && choice !== "right") return [label];
  const [side = "", ...rest] = label.split(" ");
  return [
    el("span", { class: "only-beside" }, side),
    el("span", { class: "only-below" }, choice === "left" ? "Upper" : "Lower"),
    ` ${rest.join(" ")}`,
  ];
}
