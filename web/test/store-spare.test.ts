import { expect, test } from "vitest";
import { ApiError } from "../src/api";
import { append, type Conversation, newConversation, path } from "../src/conversation";
import { SpareStore } from "../src/store-spare";
import { FakeStore } from "./fake-store";

const FULL = new ApiError("no room", "storage_full", 507);

function asked(text: string): Conversation {
  const conversation = newConversation(["m"]);
  append(conversation, 0, null, { role: "user", content: text });
  return conversation;
}

test("what the server has no room for waits here and is found again", async () => {
  const [server, spare] = [new FakeStore(), new FakeStore()];
  const store = new SpareStore(server, spare);
  const conversation = asked("room?");
  server.fails = FULL;
  await expect(store.put(conversation)).rejects.toThrow("stays in this browser");
  await expect(store.put(conversation)).rejects.toThrow("stays in this browser");
  expect((await store.list("")).map(({ id }) => id)).toEqual([conversation.id]);
  const found = await store.get(conversation.id);
  expect(found).toMatchObject({ revision: 0, messages: conversation.messages });
  server.fails = null;
  await store.put(found as Conversation);
  expect(spare.kept.size).toBe(0);
  expect(server.kept.size).toBe(1);
});

test("what waits is joined with what the server has", async () => {
  const [server, spare] = [new FakeStore(), new FakeStore()];
  const store = new SpareStore(server, spare);
  const conversation = asked("one");
  conversation.revision = (await store.put(conversation)).revision;
  server.fails = FULL;
  append(conversation, 0, conversation.heads[0] ?? null, { role: "assistant", content: "two" });
  await expect(store.put(conversation)).rejects.toThrow();
  const found = (await store.get(conversation.id)) as Conversation;
  expect(found.revision).toBe(1);
  expect(path(found).map(({ content }) => content)).toEqual(["one", "two"]);
  await store.remove(conversation.id);
  expect(await store.get(conversation.id)).toBeNull();
});

test("another failure is the server's own to tell", async () => {
  const [server, spare] = [new FakeStore(), new FakeStore()];
  server.fails = new ApiError("no key", "invalid_api_key", 401);
  await expect(new SpareStore(server, spare).put(asked("?"))).rejects.toThrow("no key");
  expect(spare.kept.size).toBe(0);
});

test("a chat that is too big for a request waits here, too", async () => {
  const [server, spare] = [new FakeStore(), new FakeStore()];
  server.fails = new ApiError("too big", "body_too_large", 413);
  await expect(new SpareStore(server, spare).put(asked("?"))).rejects.toThrow("this browser");
  expect(spare.kept.size).toBe(1);
});
