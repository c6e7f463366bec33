// The pipeline, live: what GET /debug/pipeline says of stages and of what they compute.

import { call } from "./api.js";

const BUSY_MS = 1000;
const IDLE_MS = 3000;

export class PipelineView {
  // say(text): tells a screen reader. refused(error): the server wants a key.
  constructor(element, say, refused) {
    Object.assign(this, { element, say, refused, isBusy: false, timer: 0, state: null });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
  }

  // Looks now, and again and again.
  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      this.show(await call("debug/pipeline"));
    } catch (error) {
      this.note(error.message);
      if (error.status === 401) { this.refused(error); return; }
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), this.isBusy || this.state === "restarting" ? BUSY_MS : IDLE_MS);
  }

  note(words) {
    this.element.replaceChildren(made("p", "note", words));
  }

  show({ model, pipelines, down }) {
    const parts = pipelines.map((one) => this.pipeline(one, pipelines.length > 1));
    parts.push(...down.map((one) => made("p", "lost", `Pipeline ${one.name} is down for ${one.down_s.toFixed(0)} s: ${one.problem}`)));
    if (!parts.length) parts.push(made("p", "note", "No pipeline is up yet: the model is loading."));
    this.element.replaceChildren(...parts);
    this.announce(pipelines);
    this.onmodel?.(model, pipelines);
  }

  // A change of state is said once.
  announce(pipelines) {
    const state = pipelines.some((one) => one.state === "up") ? "up" : pipelines[0]?.state ?? "lost";
    const before = this.state;
    this.state = state;
    if (before === null || before === state) return;
    if (state === "up") this.say("The pipeline is up again. Streams go on.");
    else this.say("A stage was lost. It is started again; streams wait and then go on.");
  }

  pipeline(one, isOneOfSeveral) {
    const box = made("div", `pipe ${one.state}`);
    if (isOneOfSeveral) box.append(made("h3", "", one.name));
    box.append(made("p", "rates", this.rates(one)));
    if (one.state !== "up") box.append(made("p", "lost", `${one.state === "restarting" ? "Restarting" : "Lost"}: ${one.problem ?? "a stage died"}`));
    const list = made("ol", "stages");
    list.setAttribute("aria-label", "Stages");
    const shares = one.stages.map((stage) => (stage.busy_share ?? 0) + (stage.queue ?? 0));
    const total = shares.reduce((sum, share) => sum + share, 0) || 1;
    one.stages.forEach((stage, number) => list.append(this.stage(one, stage, (one.num_in_flight * shares[number]) / total)));
    box.append(list);
    const last = one.losses.at(-1);
    if (last && one.state === "up") {
      const back = last.back_after_s === null ? "" : `, and was back after ${last.back_after_s.toFixed(1)} s`;
      box.append(made("p", "note", `Stage ${last.stage} ${last.cause}${back}. Restarts: ${one.num_restarts}.`));
    }
    return box;
  }

  rates(one) {
    const used = one.num_blocks ? Math.round((100 * one.num_used_blocks) / one.num_blocks) : 0;
    return [
      `${short(one.output_tokens_per_s)} tokens/s`,
      `${one.num_running} running, ${one.num_waiting} waiting`,
      `${one.num_in_flight} micro-batch${one.num_in_flight === 1 ? "" : "es"} in flight`,
      `KV ${used} % in use`,
      ...(one.num_drafts ? [`${one.num_accepted} of ${one.num_drafts} guessed tokens accepted`] : []),
    ].join(" · ");
  }

  stage(one, stage, numHere) {
    const item = made("li", "stage");
    const [first, last] = stage.layers;
    const name = made("p", "name", `Stage ${stage.stage}`);
    name.append(made("span", "", first === last ? `layer ${first}` : `layers ${first}–${last}`));
    item.append(name, made("p", "device", `${stage.device}, ${stage.dtype}${stage.node ? `, ${stage.node}` : ""}`));
    item.append(gauge("busy", stage.busy_share, stage.busy_share === null ? "–" : `${Math.round(100 * stage.busy_share)} %`));
    item.append(gauge("KV", stage.kv_total_bytes ? stage.kv_used_bytes / stage.kv_total_bytes : 0, `${size(stage.kv_used_bytes)} of ${size(stage.kv_total_bytes)}`));
    const step = stage.step_ms === null ? "" : `, ${stage.step_ms.toFixed(1)} ms a step`;
    item.append(made("p", "device", `${size(stage.weight_bytes)} of weights${step}`));
    const dots = made("span", "dots");
    dots.setAttribute("aria-hidden", "true");
    for (let left = Math.min(8, Math.round(numHere) || (numHere > 0.25 ? 1 : 0)); left > 0; left -= 1) dots.append(made("i", ""));
    item.append(dots);
    item.classList.toggle("dead", one.losses.some((loss) => loss.stage === stage.stage && loss.back_after_s === null));
    item.classList.toggle("working", one.num_in_flight > 0 && one.state === "up");
    return item;
  }
}

function gauge(label, share, words) {
  const line = made("label", "gauge", label);
  line.append(Object.assign(document.createElement("meter"), { min: 0, max: 1, value: share ?? 0 }), made("span", "", words));
  return line;
}

export const size = (bytes) => {
  const [unit, by] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["KB", 1e3];
  return `${bytes === 0 ? 0 : short(bytes / by)} ${unit}`;
};

export const short = (number) => number.toFixed(number >= 10 ? 0 : 1);

function made(tag, className, text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}
