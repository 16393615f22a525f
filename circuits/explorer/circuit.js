// The circuit: which edges are shown, and which of them lie on the paths of a node.
"use strict";

const data = JSON.parse(document.getElementById("relp-view").textContent);
const nodes = data.nodes;
const edges = data.edges; // as they are painted: the strongest last
edges.forEach((edge, number) => Object.assign(edge, { number, from: nodes[edge.from], to: nodes[edge.to] }));


/** Of the edges `some`, those that have a score: not what only joins the parts of a head. */
const real = (some) => some.filter((edge) => !edge.kin);
const ranked = real(edges).reverse();

// What is a dead end in the circuit itself is one of its ends, and stays.
const written = new Set(edges.map((edge) => edge.from));
const heard = new Set(edges.map((edge) => edge.to));
const inputs = nodes.filter((node) => !heard.has(node));
const outputs = nodes.filter((node) => !written.has(node));

/** Edges by the node that they leave (`from`) or enter (`to`). */
function by(end, some) {
  const found = new Map(nodes.map((node) => [node, []]));
  for (const edge of some) found.get(edge[end]).push(edge);
  return found;
}

/** The nodes that can be reached from `starts`, those included. */
function reached(starts, leaving, to) {
  const found = new Set(starts);
  for (const node of found) for (const edge of leaving.get(node)) found.add(edge[to]);
  return found;
}

/** The `count` strongest edges that still are on a path from an input to an output. */
function strongest(count) {
  const kept = new Set(ranked.slice(0, count));
  const some = edges.filter((edge) => edge.kin || kept.has(edge));
  const below = reached(inputs, by("from", some), "to");
  const above = reached(outputs, by("to", some), "from");
  return some.filter((edge) => below.has(edge.from) && above.has(edge.to));
}

/** How many edges each step of the slider asks for: from the first that closes a path, and in fine
steps where there are few. */
const steps = (() => {
  let low = 1, high = ranked.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (strongest(middle).length) high = middle; else low = middle + 1;
  }
  const more = ranked.length - low, grain = Math.min(more, 200) || 1;
  const counts = Array.from({ length: grain + 1 }, (_, i) => low + Math.ceil(more * (i / grain) ** (more > 200 ? 2 : 1)));
  return [...new Set(counts)];
})();

/** Of the edges `some`, those on paths from inputs to `node` and from there to outputs. */
function paths(node, some) {
  const after = reached([node], by("from", some), "to");
  const before = reached([node], by("to", some), "from");
  return some.filter((edge) => after.has(edge.from) || before.has(edge.to));
}

/** A number as the figures have it: a sign and four digits. */
function signed(score) {
  const text = Math.abs(score) >= 1e-4 && Math.abs(score) < 1e4
    ? String(Number(Math.abs(score).toPrecision(4)))
    : Math.abs(score).toExponential(2);
  return score === 0 ? "0" : (score > 0 ? "+" : "−") + text;
}

const sign = (score) => (score > 0 ? "positive" : score < 0 ? "negative" : "");

/** What a node is called: by its component, and where it is. */
const called = (node) =>
  `${node.label || "(no name)"}${node.place ? ` at ${node.place}` : ""}${node.text ? ` · ${node.text}` : ""}`;

/** What hovering over a node says; `heard` and `said` are its edges that are shown. */
function described(node) {
  const score = node.score === null ? "" : ` · ${data.scored} ${signed(node.score)}`;
  return `${called(node)}${score} · ${node.heard} in, ${node.said} out`;
}
