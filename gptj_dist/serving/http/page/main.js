// The page: joins the document, the server and the views, and knows the keys.

import { ApiError, call, key } from "./api.js";
import { Generator, request } from "./generate.js";
import { PipelineView, short } from "./pipeline.js";
import { Settings } from "./settings.js";
import { download, fileName, kept, store } from "./storage.js";
import { TokenView } from "./tokens.js";
import { Tree, UNTITLED } from "./tree.js";
import { TreeView } from "./treeview.js";

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((one) => [one.id, one]));
const SAVE_MS = 400;
const LONGEST_FILE = 20_000_000;

let tree = new Tree();
const newId = () => crypto.randomUUID?.() ?? String(Math.random());  // the former only with TLS or on this machine

let documentId = newId();
let chosenFrom = null;
let running = null;
let saveTimer = 0;
let isUnsaved = false;

const settings = new Settings({
  sampling: $.sampling, fields: $.fields, presets: $.presets, structure: $.structure,
  adapters: $.adapters, adapterPanel: $.adapterpanel, chatBox: $.chatbox,
});
const generator = new Generator(tree, render);
const tokens = new TokenView($, takeAlternative);
const branches = new TreeView($, goTo);
const pipeline = new PipelineView($.pipeline, say, () => askKey());

// What is shown

function render(run = null) {
  tokens.render(tree);
  if (run?.isSeveral) showChoices(run.streams.filter((one) => one?.node != null).map(({ node }) => node));
  if (!run || !generator.isRunning) { branches.render(tree); showBar(); showCurl(); }
  keep();
}

function showBar() {
  const isBusy = generator.isRunning;
  $.go.hidden = isBusy;
  $.stop.hidden = !isBusy;
  $.text.readOnly = isBusy;
  $.text.setAttribute("aria-busy", String(isBusy));
  $.again.disabled = isBusy || (tree.origin() === null && chosenFrom === null);
  $.undo.disabled = isBusy || !tree.past.length;
  $.redo.disabled = isBusy || !tree.future.length;
  const fork = tree.siblings();
  $.fork.hidden = !fork || isBusy;
  if (fork) $.forkplace.textContent = `${fork.index + 1} of ${fork.ids.length}`;
  $.score.hidden = !$.heat.value || tree.path().every(({ text, tokens: known }) => !text || known !== null);
  $.score.disabled = isBusy;
  $.title.value = tree.title;
}

function showCurl() {
  const header = key.get() ? " -H \"Authorization: Bearer $GPTJ_API_KEY\"" : "";
  let body = {};
  let path = "v1/completions";
  try { [path, body] = request(tree, tree.current, settings.fields(), settings.isChat); } catch { /* shown at its field */ }
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  $.curl.textContent = `curl ${new URL(path, document.baseURI)}${header} -H 'content-type: application/json' -d '${json}'`;
}

function showChoices(ids) {
  $.choices.hidden = ids.length === 0;
  $.choices.replaceChildren(...ids.map((id, number) => {
    const card = Object.assign(document.createElement("button"), { type: "button", className: "choice" });
    const name = Object.assign(document.createElement("b"), { textContent: `${number + 1}` });
    card.title = `Take it (Alt+${number + 1})`;
    card.append(name, Object.assign(document.createElement("span"), { textContent: tree.get(id).text }));
    card.addEventListener("click", () => { chosenFrom = null; goTo(id); $.text.focus(); });
    return card;
  }));
}

function showTook({ usage, metrics, firstMs, tookMs, numTokens }) {
  const facts = {
    "First token": firstMs === null ? "–" : `${Math.round(firstMs)} ms`,
    Rate: tookMs > firstMs && numTokens > 1 ? `${short((numTokens - 1) / ((tookMs - firstMs) / 1000))} tokens/s` : "–",
    Written: `${numTokens} tokens`,
    Prompt: usage ? `${usage.prompt_tokens} tokens` : "–",
    Cached: usage ? `${usage.prompt_tokens_details?.cached_tokens ?? 0} tokens` : "–",
  };
  const accepted = usage?.completion_tokens_details?.accepted_prediction_tokens;
  if (metrics) facts.Drafted = `${metrics.drafted_tokens} of ${numTokens} tokens`;
  if (accepted !== undefined) facts.Accepted = `${accepted} tokens`;
  $.took.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
}

function say(words) {
  $.say.textContent = words;
}

function showProblem(error) {
  clearProblem();
  if (error.status === 401) { askKey(error.message); return; }
  const field = error.field ?? error.param;
  if (field && settings.showProblem(field, error.message)) return;
  const words = document.createElement("span");
  words.textContent = `${error.message} ${error.advice ?? ""}`;
  const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Dismiss" });
  close.addEventListener("click", clearProblem);
  $.problem.replaceChildren(words, close);
  $.problem.hidden = false;
}

function clearProblem() {
  $.problem.hidden = true;
  $.problem.replaceChildren();
}

// What the user does

async function proceed(leaf = tree.current, only = {}) {
  if (generator.isRunning) return;
  clearProblem();
  showChoices([]);
  let fields;
  try {
    fields = { ...settings.fields(), ...only };
  } catch (error) { showProblem(error); return; }
  if (tree.current !== leaf) goTo(leaf);
  running = generator.run(leaf, fields, settings.isChat);
  pipeline.isBusy = true;
  pipeline.look();
  say("Writing.");
  showBar();
  $.text.focus({ preventScroll: true });
  const took = await running;
  pipeline.isBusy = false;
  chosenFrom = took.nodes.length > 1 ? leaf : null;
  render();
  showTook(took);
  const end = took.isStopped ? "Stopped" : took.error ? "Broken off" : took.reasons.includes("stop") ? "The text has ended" : "Done";
  say(`${end}: ${took.numTokens} tokens${took.nodes.length > 1 ? `, ${took.nodes.length} continuations to choose from` : ""}.`);
  if (took.error) showProblem(took.error);
  else if (took.nodes.length > 1 && !took.isStopped) $.choices.querySelector("button")?.focus();
  else toEnd();
}

// What follows the caret stays in the tree.
function proceedAtCaret() {
  if (!generator.isRunning) proceed(tree.cut(tree.current, $.text.selectionStart));
}

function again() {
  const origin = chosenFrom ?? tree.origin();
  if (origin === null || generator.isRunning) return false;
  proceed(origin);
  return true;
}

function takeAlternative(token, text, logprob) {
  if (generator.isRunning) return;
  const gen = tree.begin();
  const base = tree.cut(tree.current, token.begin);
  const node = tree.add(base, "model", text, [[text.length, logprob, token.top]], { gen });
  tree.goTo(node.id);
  render();
  toEnd();
  proceed(node.id, { n: undefined });
}

function goTo(id) {
  if (generator.isRunning) return;
  tree.goTo(id);
  showChoices([]);
  render();
  toEnd();
}

function move(isBack) {
  if (generator.isRunning || !(isBack ? tree.undo() : tree.redo())) return;
  showChoices([]);
  chosenFrom = null;
  render();
  toEnd();
  say(isBack ? "Undone." : "Done again.");
}

function turn(step) {
  const fork = tree.siblings();
  if (!fork) return;
  goTo(tree.tip(fork.ids.at((fork.index + step) % fork.ids.length)));
}

function toEnd() {
  $.text.setSelectionRange($.text.value.length, $.text.value.length);
  $.text.scrollIntoView({ block: "end" });
}

async function scoreText() {
  if (generator.isRunning) return;
  clearProblem();
  try {
    const scoring = generator.score(tree.current, settings.fields());
    showBar();
    await scoring;
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error);
  }
  render();
}

// Keys of the keyboard

function onKey(event) {
  const { key: name, ctrlKey, metaKey, altKey, target } = event;
  const isElsewhere = target !== $.text && target.matches?.("input, select, textarea");
  const commands = {
    Enter: () => (event.shiftKey ? proceedAtCaret() : proceed()),
    r: () => again(),
    z: () => (event.shiftKey ? move(false) : move(true)),
    y: () => move(false),
  };
  if (name === "Escape") {
    if (!generator.isRunning) return;
    generator.stop();
  } else if ((ctrlKey || metaKey) && !altKey && name.toLowerCase() in { Enter: 1, enter: 1, r: 1, z: 1, y: 1 }) {
    const letter = name === "Enter" ? name : name.toLowerCase();
    if ((letter !== "Enter" && isElsewhere) || (letter === "r" && metaKey)) return;
    if (commands[letter]() === false) return;
  } else if (altKey && name === "ArrowDown" && target === $.text) {
    tokens.openAtCaret();
  } else if (altKey && (name === "ArrowLeft" || name === "ArrowRight") && !isElsewhere) {
    turn(name === "ArrowLeft" ? -1 : 1);
  } else if (altKey && /^[1-8]$/.test(name)) {
    $.choices.querySelectorAll("button")[Number(name) - 1]?.click();
  } else return;
  event.preventDefault();
}

// Documents

function keep() {
  isUnsaved = tree.nodes.size > 1;
  clearTimeout(saveTimer);
  saveTimer = setTimeout(save, SAVE_MS);
}

// The model stops writing; what has come is kept.
async function leave() {
  generator.stop();
  await running;
  await save();
}

async function save() {
  clearTimeout(saveTimer);
  if (tree.nodes.size === 1) return;
  try {
    kept.set("document", documentId);
    await store.save(documentId, tree.toJSON());
    isUnsaved = false;
    await listDocuments();
  } catch (error) { $.filenote.textContent = error.message; }
}

async function listDocuments() {
  const all = await store.list().catch((error) => { $.filenote.textContent = error.message; return []; });
  if (!all.some(({ id }) => id === documentId)) all.unshift({ id: documentId, title: tree.name });
  $.documents.replaceChildren(...all.map(({ id, title }) => new Option(title, id, false, id === documentId)));
}

function use(id, next) {
  [documentId, tree, generator.tree, chosenFrom] = [id, next, next, null];
  showChoices([]);
  clearProblem();
  render();
  toEnd();
}

async function openDocument(id) {
  await leave();
  const kept = await store.load(id);
  if (kept) use(id, Tree.from(kept.tree));
}

async function begin() {
  await leave();
  use(newId(), new Tree());
  $.text.focus();
  await listDocuments();
}

async function importFile(file) {
  try {
    if (file.size > LONGEST_FILE) throw new Error(`The file has more than ${LONGEST_FILE / 1e6} MB.`);
    const text = await file.text();
    let next;
    if (file.name.endsWith(".json")) {
      let value;
      try { value = JSON.parse(text); } catch (error) { throw new Error(`The file is not JSON: ${error.message}`); }
      next = Tree.from(value);
    } else {
      next = new Tree(file.name.replace(/\.\w+$/, ""));
      next.edit(text.replaceAll("\r\n", "\n"));
    }
    await leave();
    use(newId(), next);
    $.filenote.textContent = `Imported “${next.title}”.`;
  } catch (error) { $.filenote.textContent = `Not imported. ${error.message}`; }
}

async function dropDocument() {
  if (!confirm(`Delete “${tree.title}” and all its branches from this browser?`)) return;
  await leave();
  clearTimeout(saveTimer);
  await store.remove(documentId);
  const [first] = await store.list();
  if (first) use(first.id, Tree.from((await store.load(first.id)).tree));
  else use(newId(), new Tree());
  await listDocuments();
}

// The server

function askKey(words) {
  if (words) $.keyproblem.textContent = words;
  if (!$.keydialog.open) $.keydialog.showModal();
  $.keybutton.hidden = false;
}

async function connect() {
  try {
    const { data } = await call("v1/models");
    settings.useModels(data);
    const info = await call("tokenizer_info");
    $.chatbox.hidden = !info.chat_template;
    await whenReady(data.find((card) => !card.parent)?.id);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    $.state.textContent = error.status === 401 ? "needs a key" : error.message;
    if (error.status === 401) askKey();
    else setTimeout(connect, 3000);
  }
  pipeline.look();
}

async function whenReady(model) {
  try {
    await call("ready");
    $.state.textContent = `${model}: ready`;
  } catch (error) {
    if (!(error instanceof ApiError) || error.status === 401) throw error;
    $.state.textContent = `${model}: not ready (${error.message})`;
    setTimeout(() => whenReady(model).catch(showProblem), 1500);
  }
}

function listen() {
  document.addEventListener("keydown", onKey);
  $.text.addEventListener("input", () => { tree.edit($.text.value); chosenFrom = null; showChoices([]); render(); });
  $.text.addEventListener("beforeinput", (event) => {
    if (!event.inputType.startsWith("history")) return;  // the browser's own undo would know nothing of the tree
    event.preventDefault();
    if (document.activeElement === $.text) move(event.inputType === "historyUndo");
  });
  $.go.addEventListener("click", () => proceed());
  $.stop.addEventListener("click", () => generator.stop());
  $.again.addEventListener("click", again);
  $.undo.addEventListener("click", () => move(true));
  $.redo.addEventListener("click", () => move(false));
  $.earlier.addEventListener("click", () => turn(-1));
  $.later.addEventListener("click", () => turn(1));
  $.score.addEventListener("click", scoreText);
  $.heat.addEventListener("change", showBar);
  $.mark.addEventListener("click", () => { const one = tree.get(); one.mark = !one.mark; render(); });
  $.label.addEventListener("change", () => { tree.get().label = $.label.value.trim(); render(); });
  $.prune.addEventListener("click", () => { if (tree.remove(tree.current)) { render(); toEnd(); } });
  $.new.addEventListener("click", begin);
  $.documents.addEventListener("change", () => openDocument($.documents.value));
  $.title.addEventListener("change", () => { tree.title = $.title.value.trim() || UNTITLED; render(); save(); });
  $.savejson.addEventListener("click", () => download(fileName(tree.title, "json"), "application/json", JSON.stringify(tree)));
  $.savetext.addEventListener("click", () => download(fileName(tree.title, "txt"), "text/plain", tree.text()));
  $.load.addEventListener("click", () => $.file.click());
  $.file.addEventListener("change", () => { if ($.file.files[0]) importFile($.file.files[0]); $.file.value = ""; });
  $.drop.addEventListener("click", dropDocument);
  $.copy.addEventListener("click", () => {
    if (navigator.clipboard) navigator.clipboard.writeText($.curl.textContent);
    else getSelection().selectAllChildren($.curl);  // without TLS a page may not write to the clipboard
  });
  $.keyform.addEventListener("submit", () => { key.set($.key.value.trim()); $.key.value = ""; connect(); });
  $.keycancel.addEventListener("click", () => $.keydialog.close());
  $.keybutton.addEventListener("click", () => askKey());
  // A page that is closed has no time for the database.
  addEventListener("pagehide", () => { if (isUnsaved) kept.set("unsaved", JSON.stringify({ id: documentId, tree })); });
  settings.onchange = showCurl;
  if (matchMedia("(max-width: 60rem)").matches) for (const one of document.querySelectorAll("details")) one.open = false;
}

async function start() {
  listen();
  render();
  connect();
  $.text.focus({ preventScroll: true });
  try {
    const unsaved = JSON.parse(kept.get("unsaved") || "null");
    kept.set("unsaved", "");
    if (unsaved) await store.save(unsaved.id, unsaved.tree);
    const last = await store.load(unsaved?.id ?? kept.get("document"));
    if (last && tree.nodes.size === 1) use(last.id, Tree.from(last.tree));
    await listDocuments();
  } catch (error) { $.filenote.textContent = error.message; }
}

start();
