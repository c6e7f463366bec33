// The document as text and tokens: a textarea for typing, and below it the same text, coloured. Shows what the model
// thought of a token, and the ten likeliest in its place.

import { bits, entropy, rank } from "./tree.js";

const HOVER_MS = 250;
const NUM_TOP = 10;
const BLANK_HINT = "The text ends with a blank. GPT-J's words begin with theirs: it goes on better without.";

export const visible = (text) => text.replace(/^ /, "␣").replace(/ $/, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
export const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.01 ? `${share.toPrecision(2)} %` : "< 0.01 %";
};

export class TokenView {
  // choose(token, text, logprob): the user takes another token in the place of one.
  constructor({ paper, text, about, likeliest, popover, heat }, choose) {
    Object.assign(this, { paper, text, about, likeliest, popover, heat, choose });
    this.tokens = [];
    this.shown = null;
    heat.addEventListener("change", () => this.render(this.tree));
    text.addEventListener("mousemove", (event) => this.hover(event));
    text.addEventListener("mouseleave", () => this.leave());
    popover.addEventListener("mouseenter", () => clearTimeout(this.timer));
    popover.addEventListener("mouseleave", () => this.leave());
    popover.addEventListener("keydown", (event) => this.walk(event));
    likeliest.addEventListener("click", () => this.openAtCaret());
    document.addEventListener("selectionchange", () => this.describe());
    document.addEventListener("pointerdown", ({ target }) => { if (!popover.contains(target)) this.close(); });
    addEventListener("scroll", () => this.close(), { passive: true });
  }

  render(tree) {
    this.tree = tree;
    this.tokens = tree.tokens();
    this.spans = [];
    const parts = document.createDocumentFragment();
    let number = 0;
    for (const one of tree.path()) {
      if (one.tokens === null) { if (one.text) parts.append(span(one.text, one.by)); continue; }
      for (let count = one.tokens.length; count; count -= 1) parts.append((this.spans[number] = this.tokenSpan(this.tokens[number++])));
    }
    parts.append("\u200b");
    this.paper.replaceChildren(parts);
    if (this.text.value !== tree.text()) this.fill(tree.text());
    this.describe();
  }

  fill(text) {
    const hadEnd = this.text.selectionStart === this.text.value.length;
    const caret = this.text.selectionStart;
    this.text.value = text;
    if (!hadEnd) this.text.setSelectionRange(Math.min(caret, text.length), Math.min(caret, text.length));
  }

  tokenSpan(token) {
    const level = this.level(token);
    return span(token.text, `${token.node.by} t${level === null ? "" : ` h${level}`}`);
  }

  // 0 (expected) to 5 (surprising), or null where nothing is coloured.
  level({ logprob, top, ...token }) {
    if (!this.heat.value || logprob === null) return null;
    if (this.heat.value === "entropy") return Math.min(5, Math.floor(entropy(top)));
    if (this.heat.value === "rank") {
      const place = rank({ logprob, top, ...token });
      return place === null ? 5 : place === 1 ? 0 : Math.min(4, Math.ceil(Math.log2(place)));
    }
    return Math.min(5, Math.floor(bits(logprob) / 2 + 0.5));
  }

  // The line below the document: the token at the caret, or the sum of a selection.
  describe() {
    const { selectionStart: begin, selectionEnd: end } = this.text;
    const token = this.atCaret();
    this.likeliest.hidden = !token;
    if (end > begin) this.about.textContent = this.describeSelection(begin, end);
    else if (/ $/.test(this.text.value) && begin === this.text.value.length) this.about.textContent = BLANK_HINT;
    else this.about.textContent = token ? `${quoted(token)}: ${describeToken(token)}` : "";
  }

  describeSelection(begin, end) {
    const within = this.tokens.filter((token) => token.begin >= begin && token.end <= end && token.logprob !== null);
    if (!within.length) return `${end - begin} characters selected; none has a log probability yet.`;
    const sum = within.reduce((total, { logprob }) => total + logprob, 0);
    const perplexity = Math.exp(-sum / within.length);
    return `Selection: ${within.length} token${within.length > 1 ? "s" : ""}, log probability ${sum.toFixed(2)}, perplexity ${perplexity.toPrecision(3)}`;
  }

  atCaret() {
    const caret = this.text.selectionStart;
    const known = this.tokens.filter(({ logprob, begin, end }) => logprob !== null && end > begin);
    return known.find(({ begin, end }) => begin < caret && caret <= end) ?? known.find(({ begin }) => begin === caret) ?? null;
  }

  hover({ clientX, clientY, buttons }) {
    if (buttons) return;
    const element = document.elementsFromPoint(clientX, clientY).find((one) => one.parentElement === this.paper);
    const token = this.tokens[this.spans?.indexOf(element)] ?? null;
    if (token === this.over) return;
    this.over = token;
    clearTimeout(this.timer);
    if (token && token.logprob !== null) this.timer = setTimeout(() => this.show(token, element), HOVER_MS);
    else this.leave();
  }

  leave() {
    this.over = null;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { if (!this.popover.contains(document.activeElement)) this.close(); }, HOVER_MS);
  }

  openAtCaret() {
    const token = this.atCaret();
    if (!token) return false;
    this.show(token, this.spans[this.tokens.indexOf(token)]);
    this.popover.querySelector("button")?.focus();
    return true;
  }

  show(token, element) {
    const heading = Object.assign(document.createElement("p"), { textContent: `${quoted(token)} ${describeToken(token)}` });
    const list = document.createElement("ol");
    for (const [text, logprob] of token.top.slice(0, NUM_TOP)) list.append(this.alternative(token, text, logprob));
    this.popover.replaceChildren(heading, list);
    this.popover.hidden = false;
    this.shown?.classList.remove("shown");
    (this.shown = element).classList.add("shown");
    const place = [...element.getClientRects()].at(-1);  // the first one may be the blank that ends a line
    const { offsetWidth: width, offsetHeight: height } = this.popover;
    const below = place.bottom + height + 8 < innerHeight || place.top < height + 8;
    this.popover.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
    this.popover.style.top = `${Math.max(8, below ? place.bottom + 4 : place.top - height - 4)}px`;
  }

  alternative(token, text, logprob) {
    const isWhole = !/^(bytes:|token_id:)/.test(text);
    const button = Object.assign(document.createElement("button"), { type: "button", disabled: !isWhole });
    const share = Object.assign(document.createElement("meter"), { value: Math.exp(logprob), max: 1, ariaHidden: "true" });
    button.append(span(visible(text), "what"), share, span(percent(logprob), "share"));
    button.setAttribute("aria-label", `${visible(text)}, ${percent(logprob)}`);
    if (text === token.text) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => { this.close(); this.text.focus(); this.choose(token, text, logprob); });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  walk(event) {
    const buttons = [...this.popover.querySelectorAll("button:enabled")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length)?.focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      this.close();
      this.text.focus();
    }
  }

  close() {
    clearTimeout(this.timer);
    this.popover.hidden = true;
    this.shown?.classList.remove("shown");
    this.shown = null;
  }
}

function describeToken(token) {
  const place = rank(token);
  const sure = `entropy at least ${entropy(token.top).toFixed(1)} bits`;
  return `${percent(token.logprob)}, ${bits(token.logprob).toFixed(1)} bits, rank ${place ?? `beyond ${NUM_TOP}`}, ${sure}`;
}

const quoted = (token) => `“${visible(token.text)}”`;

function span(text, className) {
  return Object.assign(document.createElement("span"), { textContent: text, className });
}
