import { expect, test } from "vitest";
import {
  append,
  type Conversation,
  dropEmpty,
  fullText,
  leafBelow,
  merge,
  newConversation,
  path,
  promptTo,
  siblings,
  titleFrom,
} from "../src/conversation";

function texts(conversation: Conversation, side = 0): string[] {
  return path(conversation, side).map((message) => message.content);
}

function chat(...turns: string[]): Conversation {
  const conversation = newConversation(["a"]);
  turns.forEach((content, index) => {
    const role = index % 2 === 0 ? "user" : "assistant";
    append(conversation, 0, conversation.heads[0] ?? null, { role, content });
  });
  return conversation;
}

test("what is said otherwise is another version, and nothing is lost", () => {
  const conversation = chat("one", "1", "two", "2");
  const [, answer, question] = path(conversation);
  const edited = append(conversation, 0, answer?.id ?? "", { role: "user", content: "zwei" });
  append(conversation, 0, edited.id, { role: "assistant", content: "2!" });
  expect(texts(conversation)).toEqual(["one", "1", "zwei", "2!"]);
  expect(siblings(conversation, edited).map((each) => each.content)).toEqual(["two", "zwei"]);
  conversation.heads[0] = leafBelow(conversation, question?.id ?? "");
  expect(texts(conversation)).toEqual(["one", "1", "two", "2"]);
});

test("two tabs that went on apart are joined without losing a turn", () => {
  const mine = chat("one", "1");
  const theirs = structuredClone(mine);
  append(mine, 0, mine.heads[0] ?? null, { role: "user", content: "mine" });
  append(theirs, 0, theirs.heads[0] ?? null, { role: "user", content: "theirs" });
  theirs.revision = 5;
  const joined = merge(mine, theirs);
  expect(texts(joined)).toEqual(["one", "1", "mine"]);
  expect(joined.messages.map((each) => each.content).sort()).toEqual([
    "1",
    "mine",
    "one",
    "theirs",
  ]);
  expect(siblings(joined, path(joined)[2] as never)).toHaveLength(2);
  expect(joined.revision).toBe(5);
});

test("of an answer in two states the one that says more counts", () => {
  const short = chat("one", "It");
  const long = structuredClone(short);
  const [, answer] = path(short);
  const [, grown] = path(long);
  if (answer && grown) {
    answer.partial = true;
    grown.content = "It is";
  }
  expect(texts(merge(short, long))).toEqual(["one", "It is"]);
  expect(texts(merge(long, short))).toEqual(["one", "It is"]);
  // one that is being continued is longer than what was whole before
  if (grown) grown.partial = true;
  if (answer) delete answer.partial;
  expect(texts(merge(short, long))).toEqual(["one", "It is"]);
  // of the same length the whole one
  if (grown) grown.content = "It";
  expect(path(merge(long, short))[1]?.partial).toBeUndefined();
});

test("a path that goes round in circles ends", () => {
  const conversation = chat("one", "1");
  const [first, last] = conversation.messages;
  if (first && last) first.parent = last.id;
  expect(path(conversation)).toHaveLength(2);
  expect(leafBelow(conversation, first?.id ?? "")).toBeTypeOf("string");
});

test("an answer without a word is taken out, another one is not", () => {
  const conversation = chat("one", "");
  dropEmpty(conversation, conversation.heads[0] ?? "");
  expect(texts(conversation)).toEqual(["one"]);
  dropEmpty(conversation, conversation.heads[0] ?? "");
  expect(texts(conversation)).toEqual(["one"]);
});

test("a prompt has the system message, the files, and no empty answers", () => {
  const conversation = chat("one", "", "two");
  conversation.system = "Be brief.";
  const last = path(conversation).at(-1);
  if (last) last.files = [{ name: "a.md", text: "```js\n1\n```" }];
  expect(promptTo(conversation, last?.id ?? "")).toEqual([
    { role: "system", content: "Be brief." },
    { role: "user", content: "two\n\na.md:\n````\n```js\n1\n```\n````" },
  ]);
  expect(last && fullText(last)).toContain("````\n```js");
});

test("two sides are apart", () => {
  const conversation = newConversation(["a", "b"]);
  for (const side of [0, 1]) {
    const question = append(conversation, side, null, { role: "user", content: "q" });
    append(conversation, side, question.id, { role: "assistant", content: `answer ${side}` });
  }
  expect(texts(conversation, 0)).toEqual(["q", "answer 0"]);
  expect(texts(conversation, 1)).toEqual(["q", "answer 1"]);
  expect(siblings(conversation, path(conversation, 1)[0] as never)).toHaveLength(1);
});

test("a title is the first line, cut between characters", () => {
  expect(titleFrom("  a  b\nc")).toBe("a b");
  expect(titleFrom("😀".repeat(100))).toBe(`${"😀".repeat(59)}…`);
  expect(chat("Why?", "So.").title).toBe("Why?");
});

test("who has only gone on from what is shown here is followed", () => {
  const mine = newConversation(["m"]);
  const question = append(mine, 0, null, { role: "user", content: "one" });
  const theirs = structuredClone(mine);
  const answer = append(theirs, 0, question.id, { role: "assistant", content: "two" });
  expect(merge(mine, theirs).heads).toEqual([answer.id]);
  // another version is another place
  const other = append(mine, 0, question.id, { role: "assistant", content: "three" });
  expect(merge(mine, theirs).heads).toEqual([other.id]);
});

test("a question that was stopped before the first word is no part of the next prompt", () => {
  const conversation = chat("one", "1", "two", "", "three");
  expect(promptTo(conversation, conversation.heads[0] ?? "")).toEqual([
    { role: "user", content: "one" },
    { role: "assistant", content: "1" },
    { role: "user", content: "three" },
  ]);
  const stopped = chat("one", "");
  expect(promptTo(stopped, stopped.heads[0] ?? "")).toEqual([{ role: "user", content: "one" }]);
});
