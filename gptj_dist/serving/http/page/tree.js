// The document: a tree of nodes. A path from the root to a node is a text. No DOM, no network.
//
// A node: { id, parent, children: [id], text, by: "user" | "model", tokens, gen, mark, label, info }
//   tokens: null, or a list of [length, logprob | null, top], whose lengths sum up to the text's;
//           top: [[text, logprob], ...], the likeliest first. Lengths and offsets are UTF-16 units, as JavaScript counts.
//   gen:    the number of the continuation that made the node; parts of one continuation have the same.
//   mark, label: a bookmark and its name.   info: what the request was and what it took.

export const FORMAT = "gptj-dist tree 1";
export const UNTITLED = "Untitled";
const COALESCE_MS = 1000;
const MAX_NODES = 50_000;

export class Tree {
  constructor(title = UNTITLED) {
    Object.assign(this, { title, nodes: new Map(), next: 1, gens: 0, root: 0, current: 0, past: [], future: [] });
    this.open = null;
    this.nodes.set(0, node(0, null, "", "user"));
  }

  get(id = this.current) {
    return this.nodes.get(id);
  }

  // The title, or the first words.
  get name() {
    return this.title === UNTITLED ? this.text().trim().replace(/\s+/g, " ").slice(0, 40) || UNTITLED : this.title;
  }

  // The nodes from the root to `id`.
  path(id = this.current) {
    const path = [];
    for (let at = this.get(id); at; at = this.nodes.get(at.parent)) path.push(at);
    return path.reverse();
  }

  text(id = this.current) {
    return this.path(id).map((one) => one.text).join("");
  }

  // The tokens of a path, with their places: { node, begin, end, text, logprob, top }. Text without scores gives none.
  tokens(id = this.current) {
    const found = [];
    let begin = 0;
    for (const one of this.path(id)) {
      if (one.tokens === null) { begin += one.text.length; continue; }
      let within = 0;
      for (const [length, logprob, top] of one.tokens) {
        const text = one.text.slice(within, within + length);
        found.push({ node: one, begin: begin + within, end: begin + within + length, text, logprob, top });
        within += length;
      }
      begin += one.text.length;
    }
    return found;
  }

  add(parent, by, text, tokens = null, more = {}) {
    if (this.nodes.size >= MAX_NODES) throw new Error(`The tree has ${MAX_NODES} nodes. Export it and begin another.`);
    const made = { ...node(this.next++, parent, text, by), tokens, ...more };
    this.nodes.set(made.id, made);
    this.get(parent).children.push(made.id);
    return made;
  }

  // Adds text and tokens to a node that is being streamed.
  append(id, text, tokens) {
    const one = this.get(id);
    one.text += text;
    if (tokens) one.tokens = tokens;
  }

  // Splits a node at an offset: a new node takes the first part, the old one keeps its id, the rest, and its children.
  split(id, at) {
    const low = this.get(id);
    const high = { ...node(this.next++, low.parent, low.text.slice(0, at), low.by), gen: low.gen, info: low.info };
    if (low.tokens) [high.tokens, low.tokens] = splitTokens(low.tokens, at);
    low.text = low.text.slice(at);
    const siblings = this.get(low.parent).children;
    siblings[siblings.indexOf(id)] = high.id;
    high.children = [id];
    low.parent = high.id;
    this.nodes.set(high.id, high);
    return high.id;
  }

  // The node at which the text of the path of `leaf` is its first `offset` units.
  cut(leaf, offset) {
    let begin = 0;
    for (const one of this.path(leaf)) {
      const end = begin + one.text.length;
      if (offset === end) return one.id;
      if (offset < end) return this.split(one.id, offset - begin);
      begin = end;
    }
    return leaf;
  }

  // The document is now `text`: finds what has changed, and branches there. Changes in quick succession are one move.
  edit(text, now = Date.now()) {
    if (text === this.text()) return;
    const last = this.open;
    if (last && now - last.at < COALESCE_MS && last.leaf === this.current) {
      this.forget(last.made);
      this.current = last.base;
    } else {
      this.remember();
      this.open = { base: this.current };
    }
    const base = this.current;
    const made = this.branch(base, text);
    Object.assign(this.open, { made, leaf: this.current, at: now });
    this.future = [];
  }

  // Ends the move that typing has begun.
  seal() {
    this.open = null;
  }

  branch(base, text) {
    const before = this.text(base);
    const first = commonStart(before, text);
    const last = commonStart(reverse(before.slice(first)), reverse(text.slice(first)));
    const tail = this.pieces(base, before.length - last);
    const made = [];
    const put = (by, piece, gen) => {
      if (piece) made.push((this.current = this.add(this.current, by, piece, null, { gen }).id));
    };
    this.current = this.cut(base, first);
    put("user", text.slice(first, text.length - last), null);
    for (const one of tail) put(one.by, one.text, one.gen);
    return made;
  }

  pieces(leaf, offset) {
    const found = [];
    let begin = 0;
    for (const one of this.path(leaf)) {
      const text = one.text.slice(Math.max(0, offset - begin));
      if (begin + one.text.length > offset) found.push({ by: one.by, text, gen: one.gen });
      begin += one.text.length;
    }
    return found;
  }

  forget(ids) {
    for (const id of [...ids].reverse()) this.detach(id);
  }

  detach(id) {
    const one = this.get(id);
    const siblings = this.get(one.parent).children;
    siblings.splice(siblings.indexOf(id), 1);
    this.nodes.delete(id);
  }

  // Moves

  remember() {
    this.past.push(this.current);
    if (this.past.length > 500) this.past.shift();
  }

  goTo(id) {
    if (id === this.current || !this.nodes.has(id)) return;
    this.remember();
    this.future = [];
    this.current = id;
    this.seal();
  }

  undo() {
    return this.step(this.past, this.future);
  }

  redo() {
    return this.step(this.future, this.past);
  }

  step(from, to) {
    this.seal();
    while (from.length) {
      const id = from.pop();
      if (!this.nodes.has(id) || id === this.current) continue;
      to.push(this.current);
      this.current = id;
      return true;
    }
    return false;
  }

  // Begins n continuations; their nodes are added as text comes.
  begin() {
    this.seal();
    return ++this.gens;
  }

  // Where the newest continuation on the path began: what "try again" continues.
  origin(id = this.current) {
    let one = this.get(id);
    if (one.by !== "model" || one.gen === null) return null;
    const gen = one.gen;
    while (one.parent !== null && this.get(one.parent).gen === gen) one = this.get(one.parent);
    return one.parent;
  }

  // The other branches at the nearest fork above `id`: { ids, index }, or null.
  siblings(id = this.current) {
    for (let at = this.get(id); at.parent !== null; at = this.get(at.parent)) {
      const ids = this.get(at.parent).children;
      if (ids.length > 1) return { ids, index: ids.indexOf(at.id) };
    }
    return null;
  }

  // The end of the newest branch below a node.
  tip(id) {
    let one = this.get(id);
    while (one.children.length) one = this.get(one.children.at(-1));
    return one.id;
  }

  // Deletes a node and all below it. Returns whether it could: the root stays.
  remove(id) {
    const one = this.get(id);
    if (one.parent === null) return false;
    const doomed = [id];
    for (const at of doomed) doomed.push(...this.get(at).children);
    if (doomed.includes(this.current)) this.current = one.parent;
    for (const at of doomed.reverse()) this.detach(at);
    this.seal();
    return true;
  }

  // Scores of the path's text: the user's parts take them, the model's keep their own.
  score(id, tokens) {
    let begin = 0;
    for (const one of this.path(id)) {
      const end = begin + one.text.length;
      if (one.tokens === null && one.text) one.tokens = within(tokens, begin, end);
      begin = end;
    }
  }

  // Files

  toJSON() {
    const { title, root, current, next, gens, past, future } = this;
    return { format: FORMAT, title, name: this.name, root, current, next, gens, past, future, nodes: [...this.nodes.values()] };
  }

  // Raises an Error that says what is wrong with a value that is no tree.
  static from(value) {
    if (value?.format !== FORMAT) throw new Error(`This is no document of this page: its format is not "${FORMAT}".`);
    if (!Array.isArray(value.nodes) || value.nodes.length > MAX_NODES) throw new Error("It has no nodes, or too many.");
    const tree = new Tree(String(value.title ?? UNTITLED).slice(0, 200));
    tree.nodes = new Map(value.nodes.map((one) => [one?.id, checked(one)]));
    for (const one of tree.nodes.values()) {
      if (one.id >= tree.next) tree.next = one.id + 1;
      if (one.gen > tree.gens) tree.gens = one.gen;
      one.children = [];
    }
    if (tree.get(0)?.parent !== null) throw new Error("It has no root.");
    for (const given of value.nodes) {
      for (const id of Array.isArray(given.children) ? given.children : []) {
        const child = tree.get(id);
        if (!child || child.parent !== given.id) throw new Error(`Node ${given.id} has a child ${id} that is not there.`);
        tree.get(given.id).children.push(id);
      }
    }
    const reached = [0];
    for (const id of reached) reached.push(...tree.get(id).children);
    if (reached.length !== tree.nodes.size) throw new Error("Some of its nodes do not hang on the root.");
    tree.current = tree.nodes.has(value.current) ? value.current : tree.tip(0);
    const known = (ids) => (Array.isArray(ids) ? ids.filter((id) => tree.nodes.has(id)) : []);
    [tree.past, tree.future] = [known(value.past), known(value.future)];
    return tree;
  }
}

// How surprising a token was, in bits.
export const bits = (logprob) => -logprob / Math.LN2;

// The entropy of the next token in bits, at least: what is not among the likeliest counts as one more.
export function entropy(top) {
  const known = top.map(([, logprob]) => Math.exp(logprob));
  const rest = Math.max(0, 1 - known.reduce((sum, p) => sum + p, 0));
  return [...known, rest].reduce((sum, p) => (p > 1e-12 ? sum - p * Math.log2(p) : sum), 0);
}

// 1 for the likeliest token, null if it is not among those that are known.
export function rank(token, num = 10) {
  const better = token.top.filter(([, logprob]) => logprob > token.logprob).length;
  return better < num ? better + 1 : null;
}

// Offsets in characters, as the server counts them, into UTF-16 units.
export function unitsOf(text) {
  if (!/[\ud800-\udfff]/.test(text)) return (offset) => Math.min(offset, text.length);
  const units = [0];
  for (const character of text) units.push(units.at(-1) + character.length);
  return (offset) => units[Math.min(offset, units.length - 1)];
}

// The server's lists of log probabilities as tokens of a text.
export function tokensOf(text, logprobs) {
  const unit = unitsOf(text);
  const begins = logprobs.text_offset.map(unit);
  return begins.map((begin, number) => {
    const top = Object.entries(logprobs.top_logprobs?.[number] ?? {}).sort((a, b) => b[1] - a[1]);
    return [(begins[number + 1] ?? text.length) - begin, logprobs.token_logprobs[number], top];
  });
}

function node(id, parent, text, by) {
  return { id, parent, children: [], text, by, tokens: null, gen: null, mark: false, label: "", info: null };
}

function checked(one) {
  const isWhole = Number.isInteger(one?.id) && one.id >= 0 && (one.parent === null || Number.isInteger(one.parent));
  if (!isWhole || typeof one.text !== "string" || !["user", "model"].includes(one.by)) {
    throw new Error(`Node ${String(one?.id)} has no text, or an unknown kind.`);
  }
  const made = { ...node(one.id, one.parent, one.text, one.by), mark: one.mark === true };
  made.label = String(one.label ?? "").slice(0, 200);
  made.gen = Number.isInteger(one.gen) ? one.gen : null;
  made.info = one.info && typeof one.info === "object" ? one.info : null;
  made.tokens = checkedTokens(one);
  return made;
}

function checkedTokens({ tokens, text }) {
  if (!Array.isArray(tokens)) return null;
  const isPair = (pair) => typeof pair?.[0] === "string" && typeof pair[1] === "number";
  const isToken = (one) =>
    Number.isInteger(one?.[0]) && one[0] >= 0 && (one[1] === null || typeof one[1] === "number") &&
    Array.isArray(one[2]) && one[2].every(isPair);
  const length = tokens.reduce((sum, one) => sum + (one?.[0] ?? NaN), 0);
  return tokens.every(isToken) && length === text.length ? tokens : null;
}

// A token that the cut goes through loses its score.
function splitTokens(tokens, at) {
  const parts = [[], []];
  let begin = 0;
  for (const [length, logprob, top] of tokens) {
    const end = begin + length;
    if (end <= at) parts[0].push([length, logprob, top]);
    else if (begin >= at) parts[1].push([length, logprob, top]);
    else { parts[0].push([at - begin, null, []]); parts[1].push([end - at, null, []]); }
    begin = end;
  }
  return parts;
}

function within(tokens, begin, end) {
  const [, rest] = splitTokens(tokens, begin);
  return splitTokens(rest, end - begin)[0];
}

function commonStart(one, other) {
  const most = Math.min(one.length, other.length);
  let at = 0;
  while (at < most && one[at] === other[at]) at += 1;
  // Between the halves of a character outside the basic plane there is no border.
  return at && at < most && /[\ud800-\udbff]/.test(one[at - 1]) ? at - 1 : at;
}

const reverse = (text) => text.split("").reverse().join("");
