// The server, by its public API. Paths are relative to the page, so a prefix of the server's is kept.

import { kept } from "./storage.js";

// An answer of the server that is an error, or none at all (status 0).
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error.message ?? "The server gave no reason.");
    Object.assign(this, { status, param: error.param ?? null, code: error.code ?? null, retryAfter });
  }

  // What to do, in a sentence.
  get advice() {
    if (this.status === 0) return "Check that the server runs and that this machine reaches it, then continue.";
    if (this.status === 401) return "Enter a key that this server knows.";
    if (this.status === 403) return "Ask whoever runs the server for a key that may do this.";
    if (this.status === 429) return `Try again in ${this.retryAfter ?? "a few"} s: the server is busy, or your key has a limit.`;
    if (this.code === "content_filter") return "The server's moderator refuses this text: change it, then continue.";
    if (this.status === 503) return "Wait until the pipeline is up; this page watches it. Then continue.";
    if (this.code === "context_length_exceeded") {
      return "Shorten the text, ask for fewer tokens, or let the beginning be left out (under Sampling).";
    }
    if (this.param) return `Change ${this.param}, then continue.`;
    return "What has arrived is kept. Continue goes on from there.";
  }
}

// It stays in this tab.
export const key = {
  get: () => kept.get("key", "sessionStorage"),
  set: (value) => kept.set("key", value, "sessionStorage"),
};

async function ask(path, body, signal) {
  const headers = { ...(body && { "content-type": "application/json" }), ...(key.get() && { authorization: `Bearer ${key.get()}` }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The server cannot be reached." });
  }
  if (response.ok) return response;
  const text = await response.text();
  let error = { message: `The server answered with status ${response.status}.` };
  try { error = JSON.parse(text).error ?? error; } catch { /* a proxy's own page */ }
  throw new ApiError(response.status, error, response.headers.get("retry-after"));
}

// A JSON answer.
export async function call(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

// The events of a stream, as they come. Aborting the signal ends it, and the request with it.
export async function* events(path, body, signal) {
  const response = await ask(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let isWhole = false;
  try {
    for await (const data of frames(response.body)) {
      if (data === "[DONE]") { isWhole = true; break; }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.code === "not_ready" ? 503 : 500, event.error);
      yield event;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, { message: "The connection broke in the middle of the answer." });
  }
  if (!isWhole) throw new ApiError(0, { message: "The answer ended before it was complete." });
}

// The data of server-sent events.
async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
