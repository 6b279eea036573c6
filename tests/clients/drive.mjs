// The JavaScript clients, driven by test_javascript.py: a request as a line of JSON on stdin, what came of it on stdout.
//
// Each client asks for the weather with a tool, runs it, and returns what the model says then, as its users would write it.
import { createInterface } from "node:readline";
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";
import AnthropicOf2023 from "anthropic-sdk-2023";
import OpenAI from "openai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const QUESTION = "What is the weather in Paris?";
const NAME = "weather";
const DESCRIPTION = "weather of a city";
const SCHEMA = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const asked = [];

globalThis.AI_SDK_LOG_WARNINGS = false; // stdout is for answers

function weather({ city }) {
  asked.push(city);
  return "sunny in " + city;
}

async function chat({ url, model, stream, retries }) {
  const client = new OpenAI({ apiKey: "dummy", baseURL: url + "/v1", maxRetries: retries });
  const tools = [{ type: "function", function: { name: NAME, description: DESCRIPTION, parameters: SCHEMA, strict: true } }];
  const messages = [{ role: "user", content: QUESTION }];
  const ask = () =>
    stream
      ? client.chat.completions
          .stream({ model, messages, tools, stream_options: { include_usage: true } })
          .finalChatCompletion()
      : client.chat.completions.create({ model, messages, tools });
  const first = (await ask()).choices[0];
  const call = first.message.tool_calls[0];
  const content = weather(JSON.parse(call.function.arguments));
  messages.push(first.message, { role: "tool", tool_call_id: call.id, content });
  const last = await ask();
  return {
    text: last.choices[0].message.content,
    ends: [first.finish_reason, last.choices[0].finish_reason],
    usage: [last.usage.prompt_tokens, last.usage.completion_tokens],
  };
}

async function responses({ url, model, stream, retries }) {
  const client = new OpenAI({ apiKey: "dummy", baseURL: url + "/v1", maxRetries: retries });
  const tools = [{ type: "function", name: NAME, description: DESCRIPTION, parameters: SCHEMA, strict: true }];
  const input = [{ role: "user", content: QUESTION }];
  const ask = () =>
    stream
      ? client.responses.stream({ model, input, tools, store: false }).finalResponse()
      : client.responses.create({ model, input, tools, store: false });
  const first = await ask();
  const call = first.output.find((item) => item.type === "function_call");
  const output = weather(JSON.parse(call.arguments));
  input.push(...first.output, { type: "function_call_output", call_id: call.call_id, output });
  const last = await ask();
  return {
    text: last.output_text,
    ends: [first.status, last.status],
    usage: [last.usage.input_tokens, last.usage.output_tokens],
  };
}

async function messages({ url, model, stream, retries }, Client = Anthropic) {
  const client = new Client({ apiKey: "dummy", baseURL: url, maxRetries: retries });
  const tools = [{ name: NAME, description: DESCRIPTION, input_schema: SCHEMA }];
  const turns = [{ role: "user", content: QUESTION }];
  const fields = { model, max_tokens: 1000, tools, messages: turns };
  const ask = () => (stream ? client.messages.stream(fields).finalMessage() : client.messages.create(fields));
  const first = await ask();
  const call = first.content.find((block) => block.type === "tool_use");
  const result = { type: "tool_result", tool_use_id: call.id, content: weather(call.input) };
  turns.push({ role: "assistant", content: first.content }, { role: "user", content: [result] });
  const last = await ask();
  return {
    text: last.content.at(-1).text,
    ends: [first.stop_reason, last.stop_reason],
    usage: [last.usage.input_tokens, last.usage.output_tokens],
    model: last.model,
  };
}

// The tool runner keeps the conversation as a thread on the server where it can.
async function runner({ url, model, stream, retries }) {
  const client = new Anthropic({ apiKey: "dummy", baseURL: url, maxRetries: retries });
  const tools = [betaTool({ name: NAME, description: DESCRIPTION, inputSchema: SCHEMA, run: weather })];
  const turns = [{ role: "user", content: QUESTION }];
  const run = client.beta.messages.toolRunner({ model, max_tokens: 1000, tools, messages: turns, stream });
  let last;
  for await (const turn of run) last = stream ? await turn.finalMessage() : turn;
  return {
    text: last.content.at(-1).text,
    ends: [last.stop_reason],
    usage: [last.usage.input_tokens, last.usage.output_tokens],
  };
}

async function aiSdk(chosen, { stream, retries }) {
  const weatherTool = tool({ description: DESCRIPTION, inputSchema: jsonSchema(SCHEMA), execute: weather });
  const errors = [];
  const fields = {
    model: chosen,
    prompt: QUESTION,
    tools: { [NAME]: weatherTool },
    stopWhen: stepCountIs(3),
    maxRetries: retries,
    onError: ({ error }) => errors.push(error),
  };
  const result = stream ? streamText(fields) : await generateText(fields);
  if (stream) await result.consumeStream();
  if (errors.length) throw errors[0];
  const steps = await result.steps;
  const usage = await result.usage;
  return {
    text: await result.text,
    ends: steps.map((step) => step.finishReason),
    usage: [usage.inputTokens, usage.outputTokens],
  };
}

const CLIENTS = {
  "openai chat": chat,
  "openai responses": responses,
  anthropic: messages,
  "anthropic of 2023": (request) => messages(request, AnthropicOf2023),
  "anthropic runner": runner,
  "ai openai": (request) => aiSdk(createOpenAI({ apiKey: "dummy", baseURL: request.url + "/v1" })(request.model), request),
  "ai openai chat": (request) =>
    aiSdk(createOpenAI({ apiKey: "dummy", baseURL: request.url + "/v1" }).chat(request.model), request),
  "ai anthropic": (request) =>
    aiSdk(createAnthropic({ apiKey: "dummy", baseURL: request.url + "/v1" })(request.model), request),
  "ai compatible": (request) => {
    const provider = createOpenAICompatible({
      name: "router",
      apiKey: "dummy",
      baseURL: request.url + "/v1",
      includeUsage: true,
    });
    return aiSdk(provider(request.model), request);
  },
  models: async ({ url, limit }) => {
    const client = new Anthropic({ apiKey: "dummy", baseURL: url });
    const paged = [];
    for await (const model of client.models.list({ limit })) paged.push(model.id);
    const listed = [];
    for await (const model of new OpenAI({ apiKey: "dummy", baseURL: url + "/v1" }).models.list()) listed.push(model.id);
    return { paged, listed };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  asked.length = 0;
  let answer;
  try {
    answer = await CLIENTS[request.client](request);
  } catch (error) {
    answer = { error: error.constructor.name, status: error.status ?? error.statusCode ?? null, message: String(error.message) };
  }
  process.stdout.write(JSON.stringify({ ...answer, asked: [...asked] }) + "\n");
}
