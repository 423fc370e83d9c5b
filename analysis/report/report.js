"use strict";
// All text from data goes in by textContent; nothing is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const figures = new Map(); // id to its view, of figures that can show one category
const state = { only: "", run: null, docs: [], doc: null, step: 0, at: null };

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

async function embed(id, spec) {
  const name = id.replace(/^figure-\d+-|^figure-/, "");
  const actions = { export: true, source: false, compiled: false, editor: false };
  try {
    return await window.vegaEmbed("#" + id, spec, { actions, renderer: "svg", downloadFileName: name });
  } catch (error) {
    console.error(id, error);
    return null;
  }
}

async function drawFigures() {
  for (const [id, spec] of Object.entries(data.figures)) {
    const result = await embed(id, spec);
    const rows = Object.values(spec.datasets || {}).flat();
    const categories = new Set(rows.map((row) => row.category).filter(Boolean));
    if (result) figures.set(id, { view: result.view, categories });
    if (result && categories.has(state.only)) isolateIn(id);
  }
}

function isolateIn(id) {
  const { view, categories } = figures.get(id);
  if (!categories.size) return;
  view.logLevel(1); // a panel without data is no fault here
  view.signal("only", categories.has(state.only) ? state.only : "").runAsync();
}

function isolate(category) {
  state.only = state.only === category ? "" : category;
  for (const chip of document.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", String(chip.dataset.category === state.only));
  }
  figures.forEach((_, id) => isolateIn(id));
  if (state.doc) show();
}

// single docs

function changeOf(doc, category, index) {
  const levels = doc.curves[category] || [];
  const level = levels[index === undefined ? levels.length - 1 : index];
  return levels.length && levels[0] !== null && level !== null ? level - levels[0] : null;
}

function signed(value, digits) {
  const rounded = Number(value.toFixed(digits));
  return (rounded > 0 ? "+" : rounded < 0 ? "\u2212" : "") + Math.abs(rounded).toFixed(digits);
}

function listDocs() {
  const wanted = byId("search").value.trim().toLowerCase();
  const texts = (doc) => [doc.id, doc.prompt, ...Object.values(doc.responses)];
  const has = (doc) => texts(doc).some((text) => text.toLowerCase().includes(wanted));
  state.docs = state.run.docs.filter((doc) => !wanted || has(doc));
  const [order, category] = JSON.parse(byId("sort").value);
  if (order) {
    const key = (doc) => changeOf(doc, category) ?? -Infinity * order;
    state.docs.sort((one, other) => order * (key(one) - key(other)));
  }
  byId("list").replaceChildren(...state.docs.map((doc) => item(doc, category)));
  if (!state.docs.includes(state.doc)) choose(state.docs[0]);
  else mark();
}

function item(doc, category) {
  const row = element("li");
  row.setAttribute("role", "option");
  row.append(element("bdi", doc.id + (doc.answers.length ? " \u2026" : "")));
  if (doc.answers.length) row.title = "with greedy answers";
  const change = changeOf(doc, category);
  if (change !== null) row.append(element("span", signed(change, 1), "change " + (change < 0 ? "down" : "up")));
  row.addEventListener("click", () => choose(doc));
  return row;
}

function mark() {
  const list = byId("list");
  [...list.children].forEach((row, index) => {
    const chosen = state.docs[index] === state.doc;
    row.setAttribute("aria-selected", String(chosen));
    const top = row.offsetTop - list.offsetTop; // scrollIntoView would move the page too
    const bottom = top + row.offsetHeight - list.clientHeight;
    if (chosen) list.scrollTop = Math.min(top, Math.max(list.scrollTop, bottom));
  });
}

async function curves(run, doc) {
  const values = [];
  for (const category of Object.keys(doc.curves)) {
    run.steps.forEach((step, index) => {
      const change = changeOf(doc, category, index);
      if (change !== null && (!state.only || state.only === category)) values.push({ category, step, change });
    });
  }
  const first = Math.max(1, run.steps.find((step) => step > 0) || 1);
  const scale = { type: "symlog", constant: first, nice: false };
  const axis = { values: run.ticks, grid: false, labelFlush: false };
  const x = { field: "step", type: "quantitative", scale, title: run.unit + " (log)", axis };
  const y = { field: "change", type: "quantitative", title: "change of this doc (nats)" };
  const colors = { domain: Object.keys(run.colors), range: Object.values(run.colors) };
  const color = { field: "category", type: "nominal", scale: colors, title: null };
  const result = await embed("curves", {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: Math.max(240, Math.min(620, byId("curves").clientWidth - 110)), height: 220,
    data: { values }, params: [{ name: "at", value: run.ticks[state.step] }],
    config: { font: "DejaVu Sans, Arial, sans-serif", legend: { orient: "bottom", columns: 3, labelLimit: 0 } },
    layer: [
      { data: { values: [{}] }, transform: [{ calculate: "at", as: "step" }], mark: { type: "rule", color: "#999" }, encoding: { x } },
      { mark: { type: "line", point: true, tooltip: true }, encoding: { x, y, color } },
    ],
  });
  state.at = result && result.view;
}

function response(run, doc, category) {
  const block = element("div");
  const change = changeOf(doc, category, run.steps.indexOf(run.ticks[state.step]));
  const head = element("h3");
  const swatch = element("span", undefined, "swatch");
  swatch.style.background = run.colors[category] || "#888";
  head.append(swatch, element("bdi", category + ": " + (change === null ? "no scores" : signed(change, 2) + " nats")));
  const text = element("div", undefined, "text");
  text.dir = "auto";
  const tokens = doc.tokens[category];
  const changes = tokens && tokens.changes[state.step];
  if (changes && changes.length) {
    tokens.texts.forEach((token, index) => {
      text.append(coloured(token, changes[index] / 100, moreOf(tokens, index)));
    });
  } else {
    text.textContent = doc.responses[category] ?? "(the text is not here)";
  }
  block.append(head, text);
  return block;
}

// rank, entropy and KL of a token at the first and the last step, where they are known
function moreOf(tokens, index) {
  const ends = (name, unit, digits) => tokens[name].map((values) => (values[index] / unit).toFixed(digits)).join(" \u2192 ");
  const found = [];
  if (tokens.ranks) found.push("rank " + ends("ranks", 1, 0));
  if (tokens.entropies) found.push("entropy " + ends("entropies", 100, 2) + " nats");
  if (tokens.kl) found.push("KL " + ends("kl", 1000, 3) + " nats");
  return found.length ? "\nfirst \u2192 last step: " + found.join(", ") : "";
}

function coloured(token, change, more) {
  const span = element("span", token, "token");
  const strength = Math.min(1, Math.abs(change) / 3).toFixed(2);
  span.style.background = change > 0 ? `rgba(0,114,178,${strength})` : `rgba(230,120,0,${strength})`;
  if (change > 1.8) span.style.color = "#fff";
  span.title = signed(change, 2) + " nats" + more;
  return span;
}

function answer(made) {
  const block = element("div");
  const end = made.ended ? "ended" : "cut at the limit";
  block.append(element("h3", `greedy answer at step ${made.step}: ${made.tokens} tokens, ${end}`));
  const text = element("div", made.text, "text");
  text.dir = "auto";
  block.append(text);
  return block;
}

function showResponses() {
  const { run, doc, only } = state;
  const shown = run.categories.filter((category) => !only || category === only);
  byId("at").value = run.unit + " " + run.ticks[state.step];
  byId("responses").replaceChildren(...shown.map((category) => response(run, doc, category)));
}

function show() {
  byId("name").textContent = "Prompt of " + state.doc.id;
  byId("prompt").textContent = state.doc.prompt;
  curves(state.run, state.doc);
  showResponses();
  byId("answers").replaceChildren(...state.doc.answers.map(answer));
}

function choose(doc) {
  if (!doc) return;
  state.doc = doc;
  mark();
  show();
}

function toStep(step) {
  state.step = Math.max(0, Math.min(state.run.ticks.length - 1, step));
  byId("step").value = state.step;
  if (state.at) state.at.signal("at", state.run.ticks[state.step]).runAsync();
  showResponses();
}

function pickRun() {
  const run = data.docs[byId("run").value];
  Object.assign(state, { run, doc: null, step: run.ticks.length - 1 });
  byId("step").max = byId("step").value = state.step;
  const orders = [["in the order of the set", 0, run.categories[0]]];
  for (const category of run.categories) {
    orders.push([category + " rose most", -1, category], [category + " fell most", 1, category]);
  }
  const choice = ([name, ...key]) => Object.assign(element("option", name), { value: JSON.stringify(key) });
  byId("sort").replaceChildren(...orders.map(choice));
  byId("omitted").textContent = run.omitted ? run.omitted + " more docs are left out to keep this file small." : "";
  listDocs();
}

function keys(event) {
  const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 };
  const steps = { ArrowRight: 1, ArrowLeft: -1 };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (moves[event.key]) choose(state.docs[state.docs.indexOf(state.doc) + moves[event.key]]);
  else if (steps[event.key]) toStep(state.step + steps[event.key]);
  else return;
  event.preventDefault();
}

for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => isolate(chip.dataset.category));
byId("columns").addEventListener("click", (event) => {
  event.target.setAttribute("aria-pressed", String(document.body.classList.toggle("all-columns")));
});
if (data.docs.length) {
  byId("run").replaceChildren(...data.docs.map((run, value) => Object.assign(element("option", run.name), { value })));
  byId("run").hidden = data.docs.length < 2;
  byId("run").addEventListener("change", pickRun);
  byId("sort").addEventListener("change", () => {
    state.doc = null; // the first in the new order is shown
    listDocs();
  });
  byId("search").addEventListener("input", listDocs);
  byId("step").addEventListener("input", () => toStep(Number(byId("step").value)));
  byId("list").addEventListener("keydown", keys);
  pickRun();
}
drawFigures();
