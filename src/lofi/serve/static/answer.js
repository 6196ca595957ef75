// One answer: asks /v1/chat/completions, reads the stream of server-sent events, and times it. Knows no view.

import { call, Refusal } from "./api.js";
import { t } from "./words.js";

/** The data of each event, in order; a chunk may end anywhere, within a character or a line. */
export async function* events(stream) {
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for await (const chunk of pieces(stream)) {
    rest += decoder.decode(chunk, { stream: true });
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "" && data.length) { yield data.join("\n"); data = []; }
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    }  // comments keep a connection open, other fields have no meaning here
  }
}

async function* pieces(stream) {  // a ReadableStream is not iterable in every browser
  const reader = stream.getReader();
  try {
    for (let step = await reader.read(); !step.done; step = await reader.read()) yield step.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Streams one answer; `onText(whole)` is called as it grows. Returns how it ended:
 * {text, finish, usage, firstMs, rate, seconds, error}. Throws nothing: a refusal and a broken stream are `error`.
 */
export async function stream({ model, messages, settings, signal, onText }) {
  const answer = { text: "", finish: null, usage: null, firstMs: null, rate: null, seconds: 0, error: null };
  const clock = { start: performance.now(), first: null, last: null, chunks: 0 };
  const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...settings };
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body, signal });
    await read(response.body, answer, clock, onText);
    if (answer.finish === null) throw new Refusal(t("error.broken"), 0);
  } catch (error) {
    if (signal.aborted) answer.finish = "cancelled";
    else { answer.finish = "error"; answer.error = error instanceof Refusal ? error.message : t("error.broken"); }
  }
  return timed(answer, clock);
}

async function read(body, answer, clock, onText) {
  for await (const data of events(body)) {
    if (data === "[DONE]") continue;  // the body ends by itself; leaving now would look like a client that went away
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, 0, chunk.error.code);
    if (chunk.usage) answer.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      clock.chunks += 1;
      answer.text += choice.delta.content;
      onText(answer.text);
    }
    if (choice?.finish_reason) answer.finish = choice.finish_reason;
  }
}

/** First token: from asking to the first text. Rate: the tokens after the first over the time that they took. */
function timed(answer, clock) {
  answer.seconds = (performance.now() - clock.start) / 1000;
  if (clock.first === null) return answer;
  answer.firstMs = clock.first - clock.start;
  const tokens = answer.usage?.completion_tokens ?? clock.chunks;
  if (tokens > 1 && clock.last > clock.first) answer.rate = (1000 * (tokens - 1)) / (clock.last - clock.first);
  return answer;
}
