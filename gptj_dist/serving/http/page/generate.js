// One continuation, or several side by side: from the tree and the settings to a request, and from its events back
// into the tree. Knows no page; `changed` is called when text has come.

import { ApiError, call, events } from "./api.js";
import { tokensOf } from "./tree.js";

const NUM_TOP = 10;

export class Generator {
  constructor(tree, changed) {
    Object.assign(this, { tree, changed, controller: null });
  }

  get isRunning() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  // Goes on from a node. Returns what it took: { nodes, usage, metrics, reasons, firstMs, tookMs, isStopped, error }.
  async run(leaf, fields, isChat) {
    const { tree } = this;
    const run = { tree, gen: tree.begin(), leaf, streams: [], usage: null, metrics: null, firstMs: null, begin: performance.now() };
    this.controller = new AbortController();
    const took = { isStopped: false, error: null };
    try {
      const [path, body] = request(tree, leaf, fields, isChat);
      for await (const event of events(path, body, this.controller.signal)) this.take(run, event, fields);
    } catch (error) {
      if (error.name === "AbortError") took.isStopped = true;
      else if (error instanceof ApiError) took.error = error;
      else throw error;
    } finally {
      this.controller = null;
    }
    this.write(run);
    return { ...took, ...this.summary(run) };
  }

  take(run, event, fields) {
    if (event.usage) run.usage = event.usage;
    if (event.metrics) run.metrics = event.metrics;
    for (const choice of event.choices ?? []) {
      const text = choice.text ?? choice.delta?.content ?? "";
      const stream = (run.streams[choice.index] ??= { text: "", offsets: [], logprobs: [], tops: [], reason: null, node: null });
      stream.text += text;
      addLogprobs(stream, choice.logprobs);
      stream.reason = choice.finish_reason ?? stream.reason;
      stream.isNew = true;
      if (run.firstMs === null && (text || choice.logprobs?.tokens?.length)) run.firstMs = performance.now() - run.begin;
    }
    run.isSeveral = (fields.n ?? 1) > 1;
    if (!run.frame) run.frame = requestAnimationFrame(() => { run.frame = 0; this.write(run); });
  }

  // Text that has come goes into the tree.
  write(run) {
    cancelAnimationFrame(run.frame);
    const { tree } = run;
    for (const stream of run.streams) {
      if (!stream?.isNew || !(stream.text || stream.reason)) continue;
      stream.isNew = false;
      if (stream.node === null) {
        stream.node = tree.add(run.leaf, "model", "", null, { gen: run.gen }).id;
        if (!run.isSeveral && tree.current === run.leaf) tree.goTo(stream.node);
      }
      const node = tree.get(stream.node);
      node.text = stream.text;
      node.tokens = stream.offsets.length ? tokensOf(stream.text, asLists(stream)) : null;
      node.info = { reason: stream.reason };
    }
    this.changed(run);
  }

  summary(run) {
    const nodes = run.streams.filter((stream) => stream && stream.node !== null).map(({ node }) => node);
    const tookMs = performance.now() - run.begin;
    return { nodes, usage: run.usage, metrics: run.metrics, reasons: run.streams.map((one) => one?.reason), firstMs: run.firstMs, tookMs, numTokens: numTokens(run) };
  }

  // Asks what the model thinks of a text that is there.
  async score(leaf, fields) {
    const { tree } = this;
    const text = tree.text(leaf);
    const { model, adapters } = fields;
    this.controller = new AbortController();
    try {
      const body = { model, adapters, prompt: text, max_tokens: 0, echo: true, logprobs: NUM_TOP };
      const answer = await call("v1/completions", body, this.controller.signal);
      tree.score(leaf, tokensOf(text, answer.choices[0].logprobs));
    } finally {
      this.controller = null;
    }
    this.changed(null);
  }
}

// The path and the body of the request that goes on from a node.
export function request(tree, leaf, fields, isChat) {
  if (!isChat) return ["v1/completions", { ...fields, prompt: tree.text(leaf), logprobs: NUM_TOP }];
  return ["v1/chat/completions", { ...fields, messages: messages(tree, leaf), logprobs: true, top_logprobs: NUM_TOP }];
}

function messages(tree, leaf) {
  const said = [];
  for (const { by, text } of tree.path(leaf)) {
    const role = by === "model" ? "assistant" : "user";
    if (said.at(-1)?.role === role) said.at(-1).content += text;
    else if (text) said.push({ role, content: text });
  }
  return said.map((one) => ({ ...one, content: one.content.trim() })).filter(({ content }) => content);
}

// Completions have lists and offsets; chat has objects with bytes, whose texts follow each other.
function addLogprobs(stream, given) {
  if (given?.tokens) {
    stream.offsets.push(...given.text_offset);
    stream.logprobs.push(...given.token_logprobs);
    stream.tops.push(...given.top_logprobs);
  }
  for (const one of given?.content ?? []) {
    stream.bytes ??= [];
    stream.offsets.push([...new TextDecoder().decode(new Uint8Array(stream.bytes)).replace(/\ufffd$/, "")].length);
    stream.bytes.push(...one.bytes);
    stream.logprobs.push(one.logprob);
    stream.tops.push(Object.fromEntries(one.top_logprobs.map(({ token, logprob }) => [token, logprob])));
  }
}

const asLists = ({ offsets, logprobs, tops }) => ({ text_offset: offsets, token_logprobs: logprobs, top_logprobs: tops });
const numTokens = (run) => run.usage?.completion_tokens ?? run.streams.reduce((sum, one) => sum + (one?.offsets.length ?? 0), 0);
