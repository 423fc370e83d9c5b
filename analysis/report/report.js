"use strict";
// All text from data goes in by textContent; nothing is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const options = { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg" };
const embed = (id, spec) => window.vegaEmbed("#" + id, spec, options).catch((error) => console.error(id, error));
for (const [id, spec] of Object.entries(data.figures)) embed(id, spec);

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name, index) => Object.assign(element("option", name), { value: index })));
}

function curves(run, doc) {
  const values = [];
  for (const [category, levels] of Object.entries(doc.curves)) {
    levels.forEach((level, index) => {
      if (level !== null && levels[0] !== null) values.push({ category, step: run.steps[index], change: level - levels[0] });
    });
  }
  const first = Math.max(1, run.steps.find((step) => step > 0) || 1);
  embed("curves", {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: 700, height: 260, data: { values }, mark: { type: "line", point: true, tooltip: true },
    encoding: {
      x: { field: "step", type: "quantitative", scale: { type: "symlog", constant: first, nice: false }, title: "step (log)", axis: { values: run.ticks, grid: false } },
      y: { field: "change", type: "quantitative", title: "change of this doc (nats per response)" },
      color: { field: "category", type: "nominal", scale: { domain: Object.keys(run.colors), range: Object.values(run.colors) }, title: null },
    },
  });
}

function response(run, doc, category) {
  const block = element("div");
  const levels = doc.curves[category] || [];
  const known = levels.length && levels[0] !== null && levels[levels.length - 1] !== null;
  const change = known ? (levels[levels.length - 1] - levels[0]).toFixed(2) + " nats" : "no scores";
  const head = element("h3");
  const swatch = element("span", undefined, "swatch");
  swatch.style.background = run.colors[category] || "#888";
  head.append(swatch, element("bdi", category + ": " + change));
  block.append(head);
  const text = element("div", undefined, "text");
  text.dir = "auto";
  const tokens = doc.tokens[category];
  if (tokens) {
    const plain = element("div", doc.responses[category] ?? "", "text");
    plain.dir = "auto";
    block.append(plain);
    tokens.texts.forEach((token, index) => {
      const moved = tokens.changes[index];
      const span = element("span", token, "token");
      const strength = Math.min(1, Math.abs(moved) / 3).toFixed(2);
      span.style.background = moved > 0 ? `rgba(0,114,178,${strength})` : `rgba(230,120,0,${strength})`;
      span.title = moved.toFixed(3) + " nats";
      text.append(span);
    });
  } else {
    text.textContent = doc.responses[category] ?? "(the text is not here)";
  }
  block.append(text);
  return block;
}

function answer(item) {
  const block = element("div");
  block.append(element("h3", `greedy answer at step ${item.step}: ${item.tokens} tokens, ${item.ended ? "ended" : "cut at the limit"}`));
  const text = element("div", item.text, "text");
  text.dir = "auto";
  block.append(text);
  return block;
}

function show() {
  const run = data.docs[document.getElementById("run").value];
  const doc = run.docs[document.getElementById("doc").value];
  document.getElementById("prompt").textContent = doc.prompt;
  curves(run, doc);
  document.getElementById("responses").replaceChildren(...run.categories.map((category) => response(run, doc, category)));
  document.getElementById("answers").replaceChildren(...doc.answers.map(answer));
}

function pick() {
  const run = data.docs[document.getElementById("run").value];
  fill(document.getElementById("doc"), run.docs.map((doc) => doc.id + (doc.answers.length ? " (with answers)" : "")));
  document.getElementById("omitted").textContent = run.omitted ? run.omitted + " more docs are left out to keep this file small" : "";
  show();
}

if (data.docs.length) {
  fill(document.getElementById("run"), data.docs.map((run) => run.name));
  document.getElementById("run").addEventListener("change", pick);
  document.getElementById("doc").addEventListener("change", show);
  pick();
}
