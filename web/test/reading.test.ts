import { expect, test } from "vitest";
import { append, newConversation, path } from "../src/conversation";
import { fileName, toJson, toMarkdown } from "../src/export";
import { readConversation, readFile } from "../src/reading";

test("what is exported can be imported", () => {
  const conversation = newConversation(["a"], "Be brief.", { temperature: 0, stop: ["x"] });
  const question = append(conversation, 0, null, { role: "user", content: "q" });
  append(conversation, 0, question.id, {
    role: "assistant",
    content: "a",
    model: "a",
    partial: true,
  });
  expect(readFile(toJson(conversation), "f")).toEqual([conversation]);
  expect(toMarkdown(conversation)).toBe(
    "# q\n\n**System**\n\nBe brief.\n\n**You**\n\nq\n\n**a**\n\na\n\n*(not whole)*\n",
  );
  expect(fileName({ ...conversation, title: "../a: b/ç?" }, "md")).toBe("a-b-ç.md");
  expect(fileName({ ...conversation, title: "..." }, "md")).toBe("chat.md");
});

test("messages of OpenAI and of FastChat can be imported", () => {
  const openai = JSON.stringify([
    { role: "system", content: "s" },
    { role: "user", content: [{ type: "text", text: "q" }] },
    { role: "assistant", content: "a" },
  ]);
  const fastchat = JSON.stringify({
    template_name: "vicuna_v1.1",
    system_message: "s",
    roles: ["USER", "ASSISTANT"],
    messages: [
      ["USER", "q"],
      ["ASSISTANT", "a"],
      ["USER", null],
    ],
  });
  for (const text of [openai, fastchat]) {
    const [conversation] = readFile(text, "f");
    expect(conversation?.system).toBe("s");
    expect(conversation && path(conversation).map((each) => each.content)).toEqual(["q", "a"]);
    expect(conversation?.title).toBe("q");
  }
});

test.each([
  ["no JSON", "f is not JSON"],
  ["[]", "f holds no conversation"],
  ["null", "f holds no conversation"],
  ['{"messages": 3}', "f holds no conversation"],
])("%s is refused in a sentence", (text, reason) => {
  expect(() => readFile(text, "f")).toThrow(reason);
});

test("fields of another kind are left out, a message that is none is no conversation", () => {
  const given = {
    id: "abcdefgh",
    title: 3,
    messages: [],
    heads: ["gone"],
    sampling: { seed: "x" },
    new: 1,
  };
  expect(readConversation(given)).toMatchObject({ title: "", heads: [], sampling: {}, new: 1 });
  expect(readConversation({ ...given, id: "../x" })).toBeNull();
  expect(
    readConversation({ ...given, messages: [{ id: "a", parent: null, role: "x", content: "" }] }),
  ).toBeNull();
});
