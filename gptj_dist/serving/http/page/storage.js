// Documents in the browser's own storage (IndexedDB), and as files.

const NAME = "gptj-dist";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("documents", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = reject;
  }).catch(() => { throw new Error("This browser keeps no documents here (a private window?). Export them."); });
}

let database = null;

async function run(mode, work) {
  const opened = await (database ??= open());
  return new Promise((resolve, reject) => {
    const transaction = opened.transaction("documents", mode);
    const request = work(transaction.objectStore("documents"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () =>
      reject(new Error(`The document is not kept: ${transaction.error?.message ?? "the storage is full"}. Export it.`));
  });
}

export const store = {
  // All documents, the newest first: [{ id, title, at }].
  async list() {
    const all = await run("readonly", (documents) => documents.getAll());
    return all.map(({ id, at, tree }) => ({ id, at, title: tree.name ?? tree.title })).sort((a, b) => b.at - a.at);
  },
  load: (id) => run("readonly", (documents) => documents.get(id)),
  save: (id, tree) => run("readwrite", (documents) => documents.put({ id, at: Date.now(), tree })),
  remove: (id) => run("readwrite", (documents) => documents.delete(id)),
};

// Small values of this browser. Where it keeps nothing, they are forgotten.
export const kept = {
  get(name, storage = "localStorage") {
    try { return window[storage].getItem(`gptj-dist ${name}`) ?? ""; } catch { return ""; }
  },
  set(name, value, storage = "localStorage") {
    try { window[storage].setItem(`gptj-dist ${name}`, value); } catch { /* until the page is closed */ }
  },
};

export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const fileName = (title, end) => `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "document"}.${end}`;
