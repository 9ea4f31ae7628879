// The official client for Node: chat, streams, the streaming helper, text completions, errors.
// NODE_PATH says where it lies; only loopback may be called.
const assert = require("node:assert");
const net = require("node:net");

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...parts) {
  const [options] = net._normalizeArgs ? net._normalizeArgs(parts[0] instanceof Array ? parts[0] : parts) : parts;
  assert(["127.0.0.1", "localhost", "::1"].includes(options.host), `called ${options.host}`);
  return connect.apply(this, parts);
};

const { OpenAI, BadRequestError, NotFoundError } = require("openai");

async function judge(url) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.OPENAI_API_KEY, maxRetries: 0 });
  const messages = [{ role: "user", content: "hi" }];
  const chat = { model: "tiny", messages, max_tokens: 8, seed: 1 };

  const whole = await client.chat.completions.create(chat);
  const text = whole.choices[0].message.content;
  assert(text.length > 0 && ["stop", "length"].includes(whole.choices[0].finish_reason));

  let streamed = "";
  let usage = null;
  const options = { ...chat, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(options)) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.strictEqual(streamed, text);
  assert.deepStrictEqual(usage, whole.usage);

  const helper = client.chat.completions.stream(chat);
  let deltas = "";
  helper.on("content", (delta) => (deltas += delta));
  assert.strictEqual((await helper.finalChatCompletion()).choices[0].message.content, text);
  assert.strictEqual(deltas, text);

  const completion = await client.completions.create({ model: "tiny", prompt: "Once", max_tokens: 4 });
  assert(completion.choices[0].text.length > 0);

  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepStrictEqual(names.sort(), ["brief", "tiny"]);

  await assert.rejects(client.chat.completions.create({ ...chat, n: 9 }), (error) => {
    assert(error instanceof BadRequestError);
    assert.strictEqual(error.param, "n");
    return error.code === "invalid_value";
  });
  await assert.rejects(client.models.retrieve("other"), NotFoundError);

  const left = client.chat.completions.stream({ ...chat, max_tokens: 150 });
  await left.emitted("content");
  left.abort();
  await assert.rejects(left.done(), (error) => error.name === "APIUserAbortError" || /abort/i.test(error.message));
}

judge(process.argv[2]).then(
  () => console.log("judged"),
  (error) => {
    console.error(error);
    process.exitCode = 1;
  },
);
