// Sampling: the form of its fields, presets, and the fields of a request. Errors appear at the field that they name.

import { kept } from "./storage.js";

const NUMBERS = [
  // name, label, default, neutral (left out of requests), min, max, step, what it does
  ["max_tokens", "Tokens", 64, null, 1, 2048, 1, "the most tokens to write"],
  ["n", "At once", 1, 1, 1, 8, 1, "continuations at once; the prompt is computed once"],
  ["temperature", "Temperature", 0.8, 1, 0, 2, 0.05, "0 takes the likeliest token, above 1 is wilder"],
  ["top_p", "Top p", 0.95, 1, 0.01, 1, 0.01, "only the likeliest tokens that make up this share"],
  ["top_k", "Top k", 0, 0, 0, 1000, 1, "only this number of tokens; 0 for all"],
  ["min_p", "Min p", 0, 0, 0, 1, 0.01, "only tokens that have this share of the likeliest one's probability"],
  ["repetition_penalty", "Repetition", 1, 1, 0.5, 2, 0.01, "above 1: less of what is there already"],
  ["presence_penalty", "Presence", 0, 0, -2, 2, 0.1, "above 0: fewer tokens that were written before"],
  ["frequency_penalty", "Frequency", 0, 0, -2, 2, 0.1, "above 0: the more often, the fewer"],
  ["seed", "Seed", null, null, 0, 2 ** 31, 1, "the same seed writes the same; empty for another text each time"],
];

const PRESETS = {
  Balanced: { temperature: 0.8, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1 },
  Likeliest: { temperature: 0, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 },
  Careful: { temperature: 0.5, top_p: 0.9, top_k: 40, min_p: 0, repetition_penalty: 1.05 },
  Wild: { temperature: 1.2, top_p: 1, top_k: 0, min_p: 0.05, repetition_penalty: 1 },
  Plain: { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1 },
};


export class Settings {
  constructor({ sampling, fields, presets, structure, adapters, adapterPanel, chatBox }) {
    Object.assign(this, { sampling, structure, adapters, adapterPanel, chatBox });
    this.model = null;
    this.maxLength = 2048;
    fields.append(...NUMBERS.map(numberField));
    presets.append(...Object.entries(PRESETS).map(([name, values]) => this.preset(name, values)));
    this.restore();
    for (const form of [sampling, structure]) {
      form.addEventListener("input", (event) => { clearProblem(event.target); this.changed(); });
      form.addEventListener("submit", (event) => event.preventDefault());
    }
    adapters.addEventListener("input", () => this.changed());
    this.changed();
  }

  preset(name, values) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      for (const [field, value] of Object.entries(values)) this.sampling.elements[field].value = value;
      this.changed();
    });
    button.fits = () => Object.entries(values).every(([field, value]) => Number(this.sampling.elements[field].value) === value);
    (this.buttons ??= []).push(button);
    return button;
  }

  changed() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.fits()));
    this.structure.elements.structured_outputs.parentElement.hidden = !this.structure.elements.kind.value;
    const values = {};
    for (const form of [this.sampling, this.structure]) {
      for (const { name, type, checked, value } of form.elements) if (name) values[name] = type === "checkbox" ? checked : value;
    }
    kept.set("settings", JSON.stringify(values));
    this.onchange?.();
  }

  restore() {
    const values = JSON.parse(kept.get("settings") || "{}");
    for (const form of [this.sampling, this.structure]) {
      for (const field of form.elements) {
        if (!(field.name in values)) continue;
        if (field.type === "checkbox") field.checked = values[field.name] === true;
        else field.value = values[field.name];
      }
    }
  }

  get n() {
    return Number(this.sampling.elements.n.value) || 1;
  }

  get isChat() {
    return !this.chatBox.hidden && this.sampling.elements.chat.checked;
  }

  // The model and adapters of /v1/models: an adapter has a parent.
  useModels(cards) {
    this.model = cards.find((card) => !card.parent)?.id ?? null;
    this.maxLength = cards[0]?.max_model_len ?? 2048;
    const names = cards.filter((card) => card.parent).map((card) => card.id);
    this.adapterPanel.hidden = !names.length;
    this.adapters.replaceChildren(...names.map(adapterField));
    this.changed();
  }

  // The fields of a request. Raises an Error with a `field` if one cannot be read.
  fields() {
    const fields = { model: this.model ?? undefined };
    for (const [name, label, , neutral] of NUMBERS) {
      const field = this.sampling.elements[name];
      if (field.value === "" && !field.validity.badInput) continue;
      const value = Number(field.value);
      if (field.validity.badInput) throw Object.assign(new Error(`${label} is not a number.`), { field: name });
      if (value !== neutral) fields[name] = value;
    }
    const { stop, ignore_eos: ignoresEnd, truncate } = this.sampling.elements;
    const stops = stop.value.split("\n").filter(Boolean).map(unescaped);
    if (stops.length) fields.stop = stops;
    if (ignoresEnd.checked) fields.ignore_eos = true;
    if (truncate.checked) fields.truncate_prompt_tokens = -1;
    const structured = this.structured();
    if (structured) fields.structured_outputs = structured;
    const chosen = [...this.adapters.querySelectorAll("input")].map(({ name, value }) => ({ name, strength: Number(value) }));
    const active = chosen.filter(({ strength }) => strength !== 0);
    if (active.length) fields.adapters = active;
    return fields;
  }

  structured() {
    const { kind, structured_outputs: source } = this.structure.elements;
    if (!kind.value || !source.value.trim()) return null;
    if (kind.value === "choice") return { choice: source.value.split("\n").filter(Boolean) };
    if (kind.value !== "json") return { [kind.value]: source.value };
    try {
      return { json: JSON.parse(source.value) };
    } catch (error) {
      throw Object.assign(new Error(`The schema is not JSON: ${error.message}`), { field: "structured_outputs" });
    }
  }

  // Shows an error at the field that it names. Returns whether there is one.
  showProblem(name, message) {
    const field = this.sampling.elements[name] ?? (name.startsWith("structured_outputs") && this.structure.elements.structured_outputs);
    if (!field) return false;
    field.closest("details").open = true;
    clearProblem(field);
    const note = Object.assign(document.createElement("p"), { id: `${field.name}-problem`, className: "fieldproblem", textContent: message });
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", note.id);
    field.closest("label").after(note);
    field.focus();
    return true;
  }
}

function clearProblem(field) {
  if (!field.getAttribute?.("aria-invalid")) return;
  field.removeAttribute("aria-invalid");
  field.removeAttribute("aria-describedby");
  document.getElementById(`${field.name}-problem`)?.remove();
}

function numberField([name, text, value, , min, max, step, meaning]) {
  const label = Object.assign(document.createElement("label"), { title: meaning });
  const input = Object.assign(document.createElement("input"), { type: "number", name, min, max, step, value: value ?? "" });
  if (value === null) input.placeholder = "any";
  label.append(text, input);
  return label;
}

function adapterField(name) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "range", name, min: -2, max: 2, step: 0.05, value: 0 });
  const shown = Object.assign(document.createElement("output"), { textContent: "0" });
  input.addEventListener("input", () => { shown.textContent = input.value; });
  label.className = "wide";
  label.append(name, " ", shown, input);
  return label;
}

const unescaped = (text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
