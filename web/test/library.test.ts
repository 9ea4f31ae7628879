import { afterEach, expect, test, vi } from "vitest";
import { until } from "./until";
import { ApiError } from "../src/api";
import { append, type Conversation, path, type Summary } from "../src/conversation";
import { type Kept, Library } from "../src/library";
import type { Store } from "../src/store";
import { FakeStore } from "./fake-store";

const libraries: Library[] = [];

function tab(store: Store) {
  const listener = {
    listed: vi.fn(),
    merged: vi.fn(),
    removed: vi.fn(),
    saveFailed: vi.fn(),
    writing: vi.fn((): string[] => []),
    writtenElsewhere: vi.fn(),
  };
  const library = new Library(store, "server", listener);
  libraries.push(library);
  return { library, listener };
}

function say(kept: Kept, content: string): void {
  const { conversation } = kept;
  append(conversation, 0, conversation.heads[0] ?? null, { role: "user", content });
}

function said(conversation: Conversation | undefined): string[] {
  return (conversation?.messages ?? []).map((message) => message.content).sort();
}

afterEach(() => {
  for (const library of libraries.splice(0)) library.close();
  vi.useRealTimers();
});

test("two tabs that write at once lose nothing", async () => {
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  say(one, "first");
  await one.save();
  const two = await tab(store).library.open(one.conversation.id);
  if (!two) throw new Error("it was saved");
  say(one, "of one");
  say(two, "of two");
  await Promise.all([one.save(), two.save()]);
  expect(said(store.kept.get(one.conversation.id))).toEqual(["first", "of one", "of two"]);
});

test("another tab hears of a save and shows it", async () => {
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  say(one, "first");
  await one.save();
  const { library, listener } = tab(store);
  const two = await library.open(one.conversation.id);
  say(one, "second");
  await one.save();
  await until(() => expect(listener.merged).toHaveBeenCalled());
  expect(said(two?.conversation)).toEqual(["first", "second"]);
});

test("another tab hears what is still being written", async () => {
  const store = new FakeStore();
  const { library, listener } = tab(store);
  const one = library.fresh(["a"]);
  say(one, "first");
  const [message] = one.conversation.messages;
  listener.writing.mockReturnValue([message?.id ?? ""]);
  const other = tab(store);
  await one.save();
  await until(() =>
    expect(other.listener.writtenElsewhere).toHaveBeenCalledWith(one.conversation.id, [
      message?.id,
    ]),
  );
});

test("what is urgent does not wait for what is not", async () => {
  vi.useFakeTimers();
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  say(one, "first");
  one.changed(3000);
  one.changed(100);
  one.changed(3000);
  await vi.advanceTimersByTimeAsync(150);
  expect(store.puts).toBe(1);
});

test("what another tab deleted is gone here, too, and not saved again", async () => {
  const store = new FakeStore();
  const { library, listener } = tab(store);
  const one = library.fresh(["a"]);
  say(one, "first");
  await one.save();
  await tab(store).library.remove(one.conversation.id);
  await until(() => expect(listener.removed).toHaveBeenCalledWith(one.conversation.id));
  await one.save();
  expect(store.kept.size).toBe(0);
});

test("what another machine deleted while it is written on is kept anew", async () => {
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  say(one, "first");
  await one.save();
  store.kept.clear();
  say(one, "second");
  await one.save();
  expect(said(store.kept.get(one.conversation.id))).toEqual(["first", "second"]);
});

test("a save that fails is tried again until it is done", async () => {
  vi.useFakeTimers();
  const store = new FakeStore();
  const { library, listener } = tab(store);
  const one = library.fresh(["a"]);
  store.fails = new ApiError("no answer", "unreachable", 0);
  say(one, "first");
  one.changed();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(store.puts).toBeGreaterThan(2);
  expect(listener.saveFailed).toHaveBeenLastCalledWith("no answer");
  store.fails = null;
  await vi.advanceTimersByTimeAsync(15_000);
  expect(listener.saveFailed).toHaveBeenLastCalledWith(null);
  expect(said(store.kept.get(one.conversation.id))).toEqual(["first"]);
});

test("many changes are one save", async () => {
  vi.useFakeTimers();
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  for (let i = 0; i < 100; i++) {
    say(one, String(i));
    one.changed();
  }
  await vi.advanceTimersByTimeAsync(1000);
  expect(store.puts).toBe(1);
});

test("an answer that grows while it is joined keeps its object", async () => {
  const store = new FakeStore();
  const one = tab(store).library.fresh(["a"]);
  say(one, "first");
  await one.save();
  const two = await tab(store).library.open(one.conversation.id);
  const answer = append(one.conversation, 0, one.conversation.heads[0] ?? null, {
    role: "assistant",
    content: "It",
    partial: true,
  });
  if (two) say(two, "of two");
  await two?.save();
  await one.save();
  answer.content += " goes on";
  expect(path(one.conversation).at(-1)).toBe(answer);
  await one.save();
  expect(said(store.kept.get(one.conversation.id))).toEqual(["It goes on", "first", "of two"]);
});

test("a chat that could not be deleted is saved on", async () => {
  const store = new FakeStore();
  const { library } = tab(store);
  const one = library.fresh(["a"]);
  say(one, "first");
  await one.save();
  vi.spyOn(store, "remove").mockRejectedValueOnce(new ApiError("no answer", "unreachable", 0));
  await expect(library.remove(one.conversation.id)).rejects.toThrow("no answer");
  say(one, "second");
  await one.save();
  expect(said(store.kept.get(one.conversation.id))).toEqual(["first", "second"]);
});

test("what is open in a library that was closed is still saved", async () => {
  const { library, listener } = tab(new FakeStore());
  const one = library.fresh(["a"]);
  library.close();
  say(one, "first");
  await one.save();
  expect(listener.saveFailed).toHaveBeenLastCalledWith(null);
  expect(one.isDirty).toBe(false);
});

test("settling waits for saves that are due or under way, and names those that fail", async () => {
  const store = new FakeStore();
  const { library } = tab(store);
  const [due, underWay] = [library.fresh(["a"]), library.fresh(["a"])];
  say(due, "due");
  due.changed();
  say(underWay, "under way");
  void underWay.save();
  expect(await library.settle()).toEqual([]);
  expect([...store.kept.keys()].sort()).toEqual(
    [due.conversation.id, underWay.conversation.id].sort(),
  );
  store.fails = new ApiError("gone", "unreachable", 0);
  say(due, "more");
  due.changed();
  expect(await library.settle()).toEqual([due.conversation.id]);
  library.drop();
  store.fails = null;
  const { puts } = store;
  library.retry();
  library.leave();
  await library.settle();
  expect(store.puts).toBe(puts);
});

test("leaving the page does not wait for a save that is under way", async () => {
  const store = new FakeStore();
  const put = vi.fn((_: Conversation, __?: boolean) => new Promise<Summary>(() => undefined));
  store.put = put;
  const { library } = tab(store);
  const kept = library.fresh(["a"]);
  say(kept, "cut?");
  void kept.save();
  await until(() => expect(put).toHaveBeenCalledTimes(1));
  library.leave();
  expect(put.mock.lastCall?.[1]).toBe(true);
  expect(put).toHaveBeenCalledTimes(2);
  // nor does anybody wait for ever
  expect(await library.settle(10)).toEqual([kept.conversation.id]);
});

test("what another library had opened is kept here from now on", async () => {
  const [server, browser] = [new FakeStore(), new FakeStore()];
  const kept = tab(server).library.fresh(["a"]);
  const { library, listener } = tab(browser);
  library.adopt(kept);
  // whoever writes an answer into it knows only this one
  say(kept, "asked meanwhile");
  await kept.save();
  expect([server.kept.size, browser.kept.size]).toEqual([0, 1]);
  expect(await library.open(kept.conversation.id)).toBe(kept);
  expect(listener.listed).toHaveBeenCalled();
});
