"use strict";
const STEPS = 65535, MODES = ["A₁ − λA₂", "A₁", "A₂"];
const raw = JSON.parse(document.getElementById("data").textContent);
const state = { mode: 0, views: [] };

async function unpack(text, kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return new kind(buffer);
}

// Where the keys of each row begin: a row at position p keeps min(most, p + 1) of them.
function offsets(view) {
  const rows = view.spans.length - view.first, one = new Uint32Array(rows + 1);
  for (let r = 0; r < rows; r++) one[r + 1] = one[r] + Math.min(view.most, view.first + r + 1);
  return one;
}

// One row of one head: its keys, both streams, λ, what is kept, and the marks' shares.
function row(view, layer, head, token) {
  const rows = view.spans.length - view.first, r = token - view.first;
  const place = view.blocks[layer] + head, at = (place * rows + r);
  const start = place * view.starts[rows] + view.starts[r], size = view.starts[r + 1] - view.starts[r];
  const lambda = view.arrays.gates ? view.arrays.gates[at] : 0, two = view.streams > 1;
  const found = { keys: [], a1: [], a2: [], value: [], signed: [], lambda, kept: [0, 0], shares: [] };
  for (let i = start; i < start + size; i++) {
    const a1 = view.arrays.weights0[i] / STEPS, a2 = two ? view.arrays.weights1[i] / STEPS : 0;
    found.keys.push(view.arrays.keys[i]); found.a1.push(a1); found.a2.push(a2);
    found.value.push(mixed(a1, a2, lambda)); found.signed.push(a1 - lambda * a2);
  }
  for (let s = 0; s < view.streams; s++) {
    found.kept[s] = view.arrays.kept[at * view.streams + s] / STEPS;
    found.shares.push(view.marks.map((_, m) => view.arrays.shares[(at * view.streams + s) * view.marks.length + m] / STEPS));
  }
  return found;
}

const mixed = (a1, a2, lambda) => state.mode === 0 ? a1 - lambda * a2 : state.mode === 1 ? a1 : a2;

// The chosen head, the mean of a layer, or of all: means are taken key by key.
function chosen(view, token) {
  const layers = view.layer < 0 ? view.layers.map((_, i) => i) : [view.layer];
  const pairs = layers.flatMap(l => (view.head < 0 ? [...view.heads[l].keys()] : [view.head]).map(h => row(view, l, h, token)));
  if (pairs.length === 1) return pairs[0];
  const sums = new Map(), n = pairs.length;
  const mean = { keys: [], a1: [], a2: [], value: [], signed: [], lambda: 0, kept: [0, 0], shares: [] };
  for (const one of pairs) {
    one.keys.forEach((key, i) => {
      const sum = sums.get(key) || [0, 0, 0, 0];
      sum[0] += one.a1[i] / n; sum[1] += one.a2[i] / n; sum[2] += one.value[i] / n; sum[3] += one.signed[i] / n;
      sums.set(key, sum);
    });
    mean.lambda += one.lambda / n;
    one.kept.forEach((v, s) => { mean.kept[s] += v / n; });
  }
  for (const [key, sum] of [...sums].sort((a, b) => a[0] - b[0])) {
    mean.keys.push(key); mean.a1.push(sum[0]); mean.a2.push(sum[1]); mean.value.push(sum[2]); mean.signed.push(sum[3]);
  }
  mean.shares = pairs[0].shares.map((_, s) => view.marks.map((_, m) =>
    pairs.reduce((t, p) => t + p.shares[s][m] / n, 0)));
  // λ and a share multiply before the mean is taken.
  mean.effective = view.marks.map((_, m) => pairs.reduce((t, p) => t + share(p, m) / n, 0));
  mean.all = pairs.reduce((t, p) => t + mixed(1, 1, p.lambda) / n, 0);
  return mean;
}

function share(found, mark) {
  if (found.effective) return found.effective[mark];
  return mixed(found.shares[0][mark], found.shares.length > 1 ? found.shares[1][mark] : 0, found.lambda);
}

const number = x => (x <= -0.00005 ? "−" : "") + Math.abs(x).toFixed(4);
const name = (view, i) => {
  const [a, b] = view.spans[i];
  return a === b ? (i ? "⟨⟩" : "⟨start⟩") : view.text.slice(a, b).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "␣");
};
const tint = (x, most) => `rgba(var(--${x < 0 ? "minus" : "plus"}), ${Math.min(1, Math.abs(x) / most).toFixed(3)})`;

function make(tag, parent, properties, text) {
  const made = Object.assign(document.createElement(tag), properties || {});
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

function build(view) {
  const box = make("section", document.getElementById("models"));
  make("h2", box, {}, view.name);
  make("p", box, { className: "kind" }, `${view.kind}; ${view.spans.length.toLocaleString("en")} tokens`);
  view.grid = make("div", box, { className: "heads" });
  const all = make("div", view.grid, { className: "row" });
  make("span", all, {}, "all");
  view.cells = [];
  cell(view, all, -1, -1, "mean of all heads", "mean");
  view.layers.forEach((layer, l) => {
    const line = make("div", view.grid, { className: "row" });
    make("span", line, {}, `layer ${layer}`);
    const heads = view.heads[l];
    if (heads.length > 1) cell(view, line, l, -1, `layer ${layer}, mean of its heads`, "mean");
    heads.forEach((head, h) => cell(view, line, l, h, `layer ${layer}, head ${head}`));
  });
  view.box = make("div", box, { className: "text", tabIndex: 0 });
  view.box.setAttribute("aria-label", "The text; arrow keys choose a token");
  const marked = new Set();
  view.marks.slice(1).forEach(([, a, b]) => { for (let i = a; i < b; i++) marked.add(i); });
  const pieces = document.createDocumentFragment();
  let end = 0;
  view.tokens = view.spans.map(([a, b], i) => {
    if (a > end) pieces.appendChild(document.createTextNode(view.text.slice(end, a)));
    const span = make("span", null, {}, a === b ? (i ? "" : "⟨start⟩") : view.text.slice(Math.max(a, end), b));
    span.dataset.i = i;
    if (i < view.first) span.className = "unread";
    if (marked.has(i)) span.classList.add("marked");
    end = Math.max(end, b);
    pieces.appendChild(span);
    return span;
  });
  view.box.appendChild(pieces);
  view.now = make("p", box, { className: "now" });
  view.table = make("table", make("div", box, { className: "scroll" }));
  view.note = make("p", box, { className: "note" });
  const pick = event => {
    const i = event.target.dataset ? event.target.dataset.i : undefined;
    if (i !== undefined) choose(view, +i);
  };
  view.box.addEventListener("pointerover", event => { if (event.pointerType !== "touch") pick(event); });
  view.box.addEventListener("click", pick);
  view.box.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(view, view.token + step);
    view.tokens[view.token].scrollIntoView({ block: "nearest" });
  });
}

function cell(view, line, layer, head, title, text) {
  const made = make("button", line, { className: "cell", type: "button", title }, text || "");
  made.setAttribute("aria-label", title);
  made.addEventListener("click", () => { view.layer = layer; view.head = head; draw(view); });
  view.cells.push({ made, layer, head });
}

// In the other models the token that begins at the same character, or holds it.
function choose(view, token) {
  if (token < view.first || token >= view.spans.length) return;
  const at = view.spans[token][0];
  for (const other of state.views) {
    let found = token;
    if (other !== view) {
      found = other.spans.findIndex(([a, b]) => b > at);
      if (token === 0 || found < 0) found = token === 0 ? 0 : other.spans.length - 1;
    }
    if (found < other.first) continue;
    other.token = found;
    draw(other);
  }
}

function draw(view) {
  const found = chosen(view, view.token);
  for (const i of view.painted || []) view.tokens[i].style.background = "";
  if (view.asked !== undefined) view.tokens[view.asked].classList.remove("query");
  const most = Math.max(1e-9, ...found.value.map(Math.abs));
  found.keys.forEach((key, i) => { view.tokens[key].style.background = tint(found.value[i], most); });
  view.painted = found.keys;
  view.asked = view.token;
  view.tokens[view.token].classList.add("query");
  grid(view);
  const where = view.layer < 0 ? "mean of all heads" : view.head < 0 ? `layer ${view.layers[view.layer]}, mean of its heads`
    : `layer ${view.layers[view.layer]}, head ${view.heads[view.layer][view.head]}`;
  const shares = view.marks.map(([title], m) => `${title} ${number(share(found, m))}`).join(" · ");
  const all = found.all !== undefined ? found.all : mixed(1, view.streams > 1 ? 1 : 0, found.lambda);
  const one = view.layer >= 0 && view.single[view.layer];
  const lambda = one ? ", one softmax map" : view.streams > 1 ? `, λ = ${found.lambda.toFixed(4)}` : "";
  view.now.textContent = `“${name(view, view.token)}” (token ${view.token}), ${where}${lambda}. Shares: ${shares} · all ${number(all)}`;
  list(view, found);
}

// How strongly each head looks at what is marked (the first token where nothing is), reading the chosen token.
function grid(view) {
  const mark = view.marks.length > 1 ? 1 : 0;
  const values = view.cells.map(c => c.head < 0 ? null : share(row(view, c.layer, c.head, view.token), mark));
  const most = Math.max(1e-9, ...values.map(v => Math.abs(v || 0)));
  view.cells.forEach((c, i) => {
    if (values[i] !== null) c.made.style.background = tint(values[i], most);
    c.made.setAttribute("aria-pressed", String(c.layer === view.layer && c.head === view.head));
  });
}

function list(view, found) {
  const order = found.keys.map((_, i) => i).sort((a, b) => Math.abs(found.value[b]) - Math.abs(found.value[a])).slice(0, 8);
  view.table.textContent = "";
  const head = make("tr", view.table), two = view.streams > 1;
  for (const title of two ? ["looks at", "token", "A₁", "A₂", "A₁ − λA₂"] : ["looks at", "token", "A"]) make("th", head, {}, title);
  for (const i of order) {
    const line = make("tr", view.table);
    make("td", line, { title: name(view, found.keys[i]) }, name(view, found.keys[i]));
    make("td", line, {}, String(found.keys[i]));
    make("td", line, {}, number(found.a1[i]));
    if (two) {
      make("td", line, {}, number(found.a2[i]));
      make("td", line, {}, number(found.signed[i])).className = found.signed[i] < 0 ? "minus" : "plus";
    }
  }
  const left = found.kept.slice(0, view.streams).map((v, s) => `${number(Math.max(0, 1 - v))}${two ? ` of A${"₁₂"[s]}` : ""}`);
  const unread = view.first ? ` Only the last ${view.spans.length - view.first} tokens can be chosen.` : "";
  view.note.textContent = `A row keeps its ${view.most} largest weights; left out here: ${left.join(", ")}.${unread} ` +
    `Heads are coloured by the share on “${view.marks[view.marks.length > 1 ? 1 : 0][0]}”.`;
}

function modes() {
  const bar = document.getElementById("modes");
  if (!state.views.some(view => view.streams > 1)) { bar.hidden = true; bar.style.display = "none"; return; }
  MODES.forEach((title, mode) => {
    const made = make("button", bar, { type: "button" }, title);
    made.setAttribute("aria-pressed", String(mode === 0));
    made.addEventListener("click", () => {
      state.mode = mode;
      [...bar.children].forEach((b, i) => b.setAttribute("aria-pressed", String(i === mode)));
      state.views.forEach(draw);
    });
  });
}

(async () => {
  for (const view of raw) {
    const kinds = { gates: Float32Array };
    const names = Object.keys(view.arrays);
    const arrays = await Promise.all(names.map(n => unpack(view.arrays[n], kinds[n] || Uint16Array)));
    view.arrays = Object.fromEntries(names.map((n, i) => [n, arrays[i]]));
    view.starts = offsets(view);
    // Where the heads of each layer begin among all blocks.
    view.blocks = view.heads.reduce((sums, heads) => [...sums, sums[sums.length - 1] + heads.length], [0]);
    view.token = view.spans.length - 1;
    view.layer = view.head = -1;
    state.views.push(view);
  }
  modes();
  state.views.forEach(build);
  state.views.forEach(draw);
  document.body.dataset.ready = "yes";
})();
