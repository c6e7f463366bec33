// The tree of continuations, as a list of branches: a row is the text from one fork to the next.

const MAX_CHARS = 90;

export class TreeView {
  // go(id): the user goes to a node.
  constructor({ tree: element, mark, prune, marked, label, labelbox }, go) {
    Object.assign(this, { element, markButton: mark, pruneButton: prune, markedOnly: marked, label, labelBox: labelbox, go });
    element.addEventListener("click", ({ target }) => this.choose(target.closest("[role=treeitem]")));
    element.addEventListener("keydown", (event) => this.walk(event));
    marked.addEventListener("change", () => this.render(this.tree));
  }

  render(tree) {
    this.tree = tree;
    const onPath = new Set(tree.path().map(({ id }) => id));
    const rows = this.rows(tree);
    const current = rows.findLast(({ ids }) => ids.some((id) => onPath.has(id)));
    const hadFocus = this.element.contains(document.activeElement);
    this.element.replaceChildren(...rows.map((row) => this.item(row, row === current, onPath)));
    if (!rows.length) this.element.replaceChildren(this.empty());
    if (hadFocus) this.element.querySelector("[tabindex='0']")?.focus();
    this.markButton.textContent = tree.get().mark ? "Remove bookmark" : "Bookmark";
    this.labelBox.hidden = !tree.get().mark;
    this.label.value = tree.get().label;
    this.pruneButton.disabled = tree.get().parent === null;
  }

  // Chains between forks, in the order of their begins: { ids, text, level, by }.
  rows(tree) {
    const rows = [];
    const walk = [...tree.get(0).children].reverse().map((id) => [id, 1]);
    while (walk.length) {
      const [begin, level] = walk.pop();
      const ids = [begin];
      while (tree.get(ids.at(-1)).children.length === 1 && !tree.get(ids.at(-1)).mark) ids.push(tree.get(ids.at(-1)).children[0]);
      const nodes = ids.map((id) => tree.get(id));
      rows.push({ ids, nodes, level });
      const { children } = nodes.at(-1);
      const depth = children.length > 1 ? level + 1 : level;
      for (const id of [...children].reverse()) walk.push([id, depth]);
    }
    return this.markedOnly.checked ? rows.filter(({ nodes }) => nodes.at(-1).mark) : rows;
  }

  item({ ids, nodes, level }, isCurrent, onPath) {
    const item = document.createElement("div");
    const end = nodes.at(-1);
    const text = nodes.map((one) => one.text).join("").trim().replace(/\s+/g, " ");
    item.setAttribute("role", "treeitem");
    item.setAttribute("aria-level", level);
    item.setAttribute("aria-selected", String(isCurrent));
    item.tabIndex = isCurrent ? 0 : -1;
    item.dataset.end = end.id;
    item.className = `${nodes.some(({ by }) => by === "model") ? "model" : "user"}${onPath.has(ids[0]) ? " on" : ""}`;
    item.style.setProperty("--level", Math.min(level, 8) - 1);
    if (end.mark) item.append(Object.assign(document.createElement("b"), { textContent: `★ ${end.label} ` }));
    item.append(text.length > MAX_CHARS ? `${text.slice(0, MAX_CHARS).replace(/\s\S*$/, "")} …` : text || "(blank)");
    return item;
  }

  empty() {
    const words = this.markedOnly.checked ? "No bookmark yet." : "Every continuation will be kept here.";
    const item = Object.assign(document.createElement("div"), { textContent: words, className: "note", tabIndex: 0 });
    item.setAttribute("role", "treeitem");
    return item;
  }

  choose(item) {
    if (item?.dataset.end) this.go(Number(item.dataset.end));
  }

  walk(event) {
    const items = [...this.element.querySelectorAll("[role=treeitem]")];
    const at = items.indexOf(document.activeElement);
    const level = (item) => Number(item.getAttribute("aria-level"));
    const parent = items.slice(0, at).findLast((item) => level(item) < level(items[at]));
    const moves = { ArrowDown: items[at + 1], ArrowUp: items[at - 1], Home: items[0], End: items.at(-1), ArrowLeft: parent, ArrowRight: items[at + 1] };
    if (event.key === "Enter" || event.key === " ") this.choose(items[at]);
    else if (event.key in moves) this.focus(moves[event.key], items);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus(item, items) {
    if (!item) return;
    for (const one of items) one.tabIndex = one === item ? 0 : -1;
    item.focus();
  }
}
