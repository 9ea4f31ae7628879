import { afterEach, expect, test, vi } from "vitest";
import { until } from "./until";
import { ApiError } from "../src/api";
import { Asking } from "../src/asking";
import { newConversation, path } from "../src/conversation";
import type { Kept } from "../src/library";

const encoder = new TextEncoder();

function event(value: unknown): string {
  return `data: ${JSON.stringify(value)}\n\n`;
}

function delta(content: string): string {
  return event({ choices: [{ index: 0, delta: { content }, finish_reason: null }] });
}

const END =
  event({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }] }) +
  event({ choices: [], usage: { prompt_tokens: 5, completion_tokens: 2 } }) +
  "data: [DONE]\n\n";

/** Answers each request with the next of these: frames, or a status with an error. */
function serve(...answers: (string[] | { status: number; error: unknown; retryAfter?: string })[]) {
  const requests: { body: Record<string, unknown>; signal: AbortSignal }[] = [];
  const fetched = vi.fn(async (_: string, init: RequestInit) => {
    requests.push({ body: JSON.parse(String(init.body)), signal: init.signal as AbortSignal });
    const answer = answers.shift();
    if (!answer) throw new TypeError("failed to fetch");
    if (!Array.isArray(answer)) {
      const headers: HeadersInit = answer.retryAfter ? { "retry-after": answer.retryAfter } : {};
      return new Response(JSON.stringify({ error: answer.error }), {
        status: answer.status,
        headers,
      });
    }
    const body = new ReadableStream({
      async start(controller) {
        for (const frame of answer) {
          if (frame === "wait")
            await new Promise((go) => init.signal?.addEventListener("abort", go));
          if (init.signal?.aborted)
            return controller.error(new DOMException("stopped", "AbortError"));
          controller.enqueue(encoder.encode(frame));
        }
        controller.close();
      },
    });
    return new Response(body, { headers: { "content-type": "text/event-stream" } });
  });
  vi.stubGlobal("fetch", fetched);
  return requests;
}

function chat(models = ["a"]) {
  const conversation = newConversation(models, "", { temperature: 0 });
  const kept = { conversation, changed: vi.fn() } as unknown as Kept;
  const ended = vi.fn();
  const needsKey = vi.fn(async (_: ApiError) => true);
  const asking = new Asking({ changed: vi.fn(), grew: vi.fn(), ended, needsKey });
  const over = (times = 1) => until(() => expect(ended).toHaveBeenCalledTimes(times));
  return { conversation, kept, asking, ended, needsKey, over };
}

afterEach(() => vi.unstubAllGlobals());

test("a whole answer", async () => {
  const requests = serve([": ping\n\n", delta("It"), delta(" is"), END]);
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  expect(asking.isBusy(conversation)).toBe(true);
  await over();
  expect(asking.isBusy(conversation)).toBe(false);
  const [, answer] = path(conversation);
  expect(answer).toMatchObject({ content: "It is", finish_reason: "stop", model: "a" });
  expect(answer?.usage).toEqual({ prompt_tokens: 5, completion_tokens: 2 });
  expect(answer).not.toHaveProperty("partial");
  expect(requests[0]?.body).toMatchObject({
    model: "a",
    stream: true,
    temperature: 0,
    messages: [{ role: "user", content: "what?" }],
  });
  expect(requests[0]?.body).not.toHaveProperty("top_p");
});

test.each([
  ["without [DONE]", [delta("It")], "the connection closed before the answer was whole"],
  ["with an error", [delta("It"), event({ error: { message: "no memory" } })], "no memory"],
  ["with junk", [delta("It"), "data: {\n\n"], "the server sent an event that is not JSON"],
])("an answer that ends %s keeps its text, and can go on", async (_, frames, reason) => {
  const requests = serve(frames, [delta(" is"), END]);
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  await over();
  const answer = path(conversation)[1];
  expect(answer).toMatchObject({ content: "It", partial: true, error: reason });
  if (answer) asking.continue(kept, answer);
  await over(2);
  expect(answer).toMatchObject({ content: "It is", finish_reason: "stop" });
  expect(answer).not.toHaveProperty("error");
  expect(answer).not.toHaveProperty("partial");
  expect(requests[1]?.body).toMatchObject({
    continue_final_message: true,
    messages: [{ role: "user" }, { role: "assistant", content: "It" }],
  });
});

test("a question that is refused is kept without an empty answer", async () => {
  serve({ status: 429, error: { message: "full", code: "rate_limit_exceeded" }, retryAfter: "7" }, [
    END,
  ]);
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  await over();
  const [question] = path(conversation);
  expect(conversation.messages).toHaveLength(1);
  const failure = asking.failures.get(question?.id ?? "");
  expect(failure).toMatchObject({ message: "full", code: "rate_limit_exceeded", retryAfterS: 7 });
  asking.answer(kept, 0, question?.id ?? "");
  await over(2);
  expect(asking.failures.size).toBe(0);
});

test("a server that is gone is told so", async () => {
  serve();
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  await over();
  expect([...asking.failures.values()][0]?.isUnreachable).toBe(true);
  // the next question stands in the place of the one without an answer
  serve([delta("It"), END]);
  asking.send(kept, "what now?", []);
  await over(2);
  expect(path(conversation).map((each) => each.content)).toEqual(["what now?", "It"]);
  expect(conversation.messages.map((each) => each.content)).toContain("what?");
});

test("a key that is asked for and given lets the same question go on", async () => {
  serve({ status: 401, error: { message: "key", code: "invalid_api_key" } }, [delta("It"), END]);
  const { conversation, kept, asking, needsKey, over } = chat();
  asking.send(kept, "what?", []);
  await over(2);
  expect(needsKey).toHaveBeenCalledOnce();
  expect(path(conversation).map((each) => each.content)).toEqual(["what?", "It"]);
});

test("stop ends the request and keeps what there is", async () => {
  const requests = serve([delta("It"), "wait", delta("more")]);
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  await until(() => expect(path(conversation)[1]?.content).toBe("It"));
  asking.stop(conversation);
  await over();
  expect(requests[0]?.signal.aborted).toBe(true);
  expect(path(conversation)[1]).toMatchObject({
    content: "It",
    partial: true,
    finish_reason: "stopped",
  });
  expect(asking.failures.size).toBe(0);
});

test("two models answer the same question apart, and one of them again", async () => {
  const requests = serve([delta("A"), END], [delta("B"), END], [delta("B2"), END]);
  const { conversation, kept, asking, over } = chat(["a", "b"]);
  asking.send(kept, "what?", []);
  await over(2);
  expect(requests.map((each) => each.body.model)).toEqual(["a", "b"]);
  const right = path(conversation, 1).at(-1);
  if (right) asking.regenerate(kept, right);
  await over(3);
  expect(path(conversation, 0).map((each) => each.content)).toEqual(["what?", "A"]);
  expect(path(conversation, 1).map((each) => each.content)).toEqual(["what?", "B2"]);
  const again = path(conversation, 1).at(-1);
  if (again) asking.step(kept, again, -1);
  expect(path(conversation, 1).map((each) => each.content)).toEqual(["what?", "B"]);
});

test("half a surrogate pair does not stay in the text", async () => {
  serve([delta("a\ud83dz \ude00 😀"), END]);
  const { conversation, kept, asking, over } = chat();
  asking.send(kept, "what?", []);
  await over();
  expect(path(conversation)[1]?.content).toBe("a\ufffdz \ufffd 😀");
});

test("stopping all resolves when what had come is in its message", async () => {
  serve([delta("It"), "wait", delta("more")]);
  const { conversation, kept, asking } = chat();
  asking.send(kept, "what?", []);
  await until(() => expect(path(conversation)[1]?.content).toBe("It"));
  await asking.stopAll();
  expect(asking.answerings.size).toBe(0);
  expect(path(conversation)[1]).toMatchObject({ content: "It", finish_reason: "stopped" });
});
