// What answers the mouse, the keys and the fields.
"use strict";

const el = (id) => document.getElementById(id);
const framed = window !== window.parent; // in a notebook
const say = (text) => { el("said").textContent = text; };

// -- pan and zoom --------------------------------------------------------------------------------

let moved = false; // by hand: then a new size of the window leaves the view alone
const awake = () => !framed || document.hasFocus(); // else the wheel scrolls the notebook

const zoom = d3.zoom()
  .filter((event) => (event.type === "wheel"
    ? event.ctrlKey || event.metaKey || awake()
    : !event.button && !event.target.closest("#panel, #map")))
  // a pinch comes as Ctrl and a wheel that turns little; a wheel with Ctrl held turns as without
  .wheelDelta(({ deltaY, deltaMode, ctrlKey }) => -deltaY
    * (deltaMode === 1 ? 0.05 : deltaMode ? 1 : 0.002) * (ctrlKey && Math.abs(deltaY) < 40 ? 10 : 1))
  .on("start", () => touch(null))
  .on("zoom", (event) => {
    state.at = event.transform;
    if (event.sourceEvent) moved = true;
    place();
  })
  .on("end", (event) => { if (event.sourceEvent?.type !== "wheel") settle(); });

function bounds() {
  const least = Math.min(fitted().k, stage.clientWidth / (RIGHT - LEFT + 100), stage.clientHeight / (BOTTOM - TOP + 40));
  zoom.scaleExtent([least * 0.9, 5]).extent([[0, 0], [stage.clientWidth, stage.clientHeight]])
    .translateExtent([[LEFT - 600, TOP - 400], [RIGHT + 600, BOTTOM + 400]]);
}

const view = d3.select(stage).call(zoom).on("dblclick.zoom", null);

function fit() {
  moved = false;
  bounds();
  view.call(zoom.transform, fitted());
  settle();
}

const scaleBy = (factor) => { moved = true; view.call(zoom.scaleBy, factor); };

/** Moves the view so that the node is in it, and not below the panel. */
function reveal(node) {
  const [x, y] = state.at.apply([node.x, node.y]);
  const right = stage.clientWidth - (!el("panel").hidden && !narrow() ? 250 : 0) - 60;
  const low = stage.clientHeight - (!el("panel").hidden && narrow() ? 0.42 * stage.clientHeight : 0) - 40;
  const by = [x < 60 ? 60 - x : x > right ? right - x : 0, y < 40 ? 40 - y : y > low ? low - y : 0];
  if (by.some(Boolean)) {
    moved = true;
    view.call(zoom.translateBy, by[0] / state.at.k, by[1] / state.at.k);
    settle();
  }
}

new ResizeObserver(() => { bounds(); if (moved) place(); else fit(); }).observe(stage);

let hidden; // when the hint will be
stage.addEventListener("wheel", (event) => {
  if (!framed || awake() || event.ctrlKey || event.metaKey) return;
  el("hint").hidden = false;
  clearTimeout(hidden);
  hidden = setTimeout(() => { el("hint").hidden = true; }, 900);
}, { passive: true });

for (const kind of ["pointerdown", "pointermove"]) {
  map.addEventListener(kind, (event) => {
    if (!event.buttons) return;
    event.preventDefault();
    map.setPointerCapture(event.pointerId);
    const box = map.getBoundingClientRect();
    const x = (LEFT + RIGHT) / 2 + (event.clientX - box.x - box.width / 2) / MAP;
    const y = (TOP + BOTTOM) / 2 + (event.clientY - box.y - box.height / 2) / MAP;
    moved = true;
    view.call(zoom.translateTo, x, y);
  });
}

// -- hovering ------------------------------------------------------------------------------------

/** The node that the mouse is on. */
const under = (event) => event.target.closest(".node")?.__data__ ?? null;

/** Points along an edge, and its ends up and down, made when first asked for. */
function path(edge) {
  if (edge.path) return edge.path;
  const [a, b, c, d, e, f, g, h] = edge.curve;
  edge.path = Float32Array.from({ length: 50 }, (_, i) => {
    const t = (i >> 1) / 24, s = 1 - t, [p, q, r, l] = i % 2 ? [b, d, f, h] : [a, c, e, g];
    return s * s * s * p + 3 * s * s * t * q + 3 * s * t * t * r + t * t * t * l;
  });
  const heights = edge.path.filter((_, i) => i % 2);
  Object.assign(edge, { top: Math.min(...heights), bottom: Math.max(...heights) });
  return edge.path;
}

/** The edge that is nearest to a point of the circuit, at most `far` from it. */
function nearest(x, y, far) {
  let best = null, least = far * far;
  const some = state.chosen || state.hits ? d3.selectAll("#lit path").data() : state.shown;
  for (let n = some.length - 1; n >= 0; n--) {
    const at = path(some[n]);
    if (y > some[n].bottom + far || y < some[n].top - far) continue;
    for (let i = 0; i < 48; i += 2) {
      const dx = at[i + 2] - at[i], dy = at[i + 3] - at[i + 1];
      const t = Math.max(0, Math.min(1, ((x - at[i]) * dx + (y - at[i + 1]) * dy) / (dx * dx + dy * dy || 1)));
      const distance = (x - at[i] - t * dx) ** 2 + (y - at[i + 1] - t * dy) ** 2;
      if (distance < least) [best, least] = [some[n], distance];
    }
  }
  return best;
}

/** Draws one edge over all the others; none if it is null. */
function touch(edge) {
  d3.select("#touched").selectAll("path").data(edge ? [edge] : []).join("path")
    .attr("d", (e) => curve(e.curve)).attr("class", dressed)
    .attr("stroke-width", (e) => Math.max(e.width, 3 / state.at.k));
  if (!edge) el("tip").hidden = true;
}

function tip(text, event) {
  const box = el("tip");
  box.textContent = text;
  box.hidden = false;
  box.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.offsetWidth - 6))}px`;
  box.style.top = `${event.clientY + 16 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 8 : event.clientY + 16}px`;
}

stage.addEventListener("pointermove", (event) => {
  if (event.buttons) return;
  if (event.target.closest("#panel, #map")) return touch(null);
  const node = under(event);
  const box = stage.getBoundingClientRect();
  const [x, y] = state.at.invert([event.clientX - box.x, event.clientY - box.y]);
  const edge = node ? null : nearest(x, y, 7 / state.at.k);
  touch(edge);
  if (node || edge) tip(node ? described(node) : edge.note, event);
});
stage.addEventListener("pointerleave", () => touch(null));

// -- choosing a node -----------------------------------------------------------------------------

function choose(node, { focus = false } = {}) {
  state.chosen = node;
  if (node) state.active = node;
  if (node && state.hits) clearSearch();
  paintChoice();
  paintMap();
  showPanel();
  if (node) {
    reveal(node);
    if (focus) node.element.focus({ preventScroll: true });
    say(`${described(node)}; ${real(paths(node, state.shown)).length} edges on its paths`);
  }
}

// What is clicked in the panel is gone by the time the click gets to the stage.
el("panel").addEventListener("click", (event) => event.stopPropagation());
map.addEventListener("click", (event) => event.stopPropagation());

stage.addEventListener("click", (event) => {
  const node = under(event);
  if (node) node.element.focus({ preventScroll: true });
  else stage.focus({ preventScroll: true });
  choose(node === state.chosen ? null : node);
});

function add(parent, tag, text, kind) {
  const child = parent.appendChild(document.createElement(tag));
  if (text !== undefined) child.textContent = text;
  if (kind) child.className = kind;
  return child;
}

/** The chosen node's numbers, and its edges from the strongest down. */
function showPanel() {
  const panel = el("panel"), node = state.chosen;
  panel.replaceChildren();
  panel.hidden = !node;
  if (!node) return;
  const lit = paths(node, state.shown);
  const close = add(panel, "button", "×", "close");
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => choose(null));
  add(panel, "h2", called(node));
  const score = node.score === null ? "" : `${data.scored} ${signed(node.score)} · `;
  add(panel, "p", `${score}${real(lit).length} edges on its paths`);
  for (const [title, own, other] of [["Incoming", "to", "from"], ["Outgoing", "from", "to"]]) {
    const some = lit.filter((edge) => edge[own] === node).reverse();
    if (!some.length) continue;
    add(panel, "h3", `${title} · ${some.length}`);
    const list = add(panel, "ul");
    for (const edge of some) {
      const item = add(add(list, "li"), "button");
      const slot = edge.kin || edge.slot === "in" ? "" : other === "from" ? ` → ${edge.slot}` : `.${edge.slot}`;
      add(item, "span", (edge[other].pos === node.pos ? edge[other].label : called(edge[other])) + slot);
      add(item, "span", edge.kin ? "reads for" : signed(edge.score), `number ${edge.kin ? "" : sign(edge.score)}`);
      item.title = edge.note;
      item.addEventListener("click", () => choose(edge[other], { focus: true }));
      item.addEventListener("pointerenter", () => touch(edge));
      item.addEventListener("pointerleave", () => touch(null));
    }
  }
  panel.scrollTop = 0;
}

// -- the slider ----------------------------------------------------------------------------------

const slider = el("threshold");
slider.max = Math.max(0, steps.length - 1);
slider.value = state.step;

function threshold(step) {
  state.step = Math.max(0, Math.min(steps.length - 1, step));
  slider.value = state.step;
  paintEdges();
  showPanel();
  const shown = real(state.shown).length;
  const least = ranked[steps[state.step] - 1];
  const text = `${shown.toLocaleString("en")} · |s| ≥ ${least ? signed(Math.abs(least.score)).slice(1) || "0" : "0"}`;
  el("shown").textContent = text;
  slider.setAttribute("aria-valuetext", `${shown} edges, absolute score at least ${text.split("≥ ")[1]}`);
}
slider.addEventListener("input", () => threshold(Number(slider.value)));

// -- searching -----------------------------------------------------------------------------------

const field = el("search");

function search() {
  const text = field.value.trim().toLowerCase();
  state.sought = text ? (node) => `${node.id} ${called(node)} ${node.kind}`.toLowerCase().includes(text) : null;
  paintChoice();
  if (text) say(`${state.hits.size} nodes match`);
}

function clearSearch() {
  field.value = "";
  state.sought = state.hits = null;
  d3.selectAll(".token").classed("on", false);
}

field.addEventListener("input", search);
field.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { clearSearch(); paintChoice(); stage.focus(); }
  if (event.key === "Enter" && state.hits?.size) {
    const [first] = state.hits;
    choose(first, { focus: true });
  }
  event.stopPropagation();
});

// -- keys ----------------------------------------------------------------------------------------

/** The node to which an arrow leads: the nearest that way, counting sideways distance double. */
function towards(node, dx, dy) {
  let best = null, least = Infinity;
  for (const other of nodes) {
    const x = other.x - node.x, y = other.y - node.y;
    const ahead = x * dx + y * dy, aside = Math.abs(x * dy - y * dx);
    if (!other.used || ahead < 1 || aside > 3 * ahead && dx) continue;
    if (ahead + 2 * aside < least) [best, least] = [other, ahead + 2 * aside];
  }
  return best;
}

el("nodes").addEventListener("focusin", (event) => reveal(event.target.__data__)); // Tab came here

function walk(node) {
  if (!node) return;
  state.active = node;
  if (state.chosen) choose(node);
  else paintChoice();
  node.element.focus({ preventScroll: true });
}

function along(by) {
  const used = nodes.filter((node) => node.used);
  const here = document.activeElement === state.active?.element ? used.indexOf(state.active) + by : 0;
  walk(used[(here + used.length) % used.length]);
}

function arrow(dx, dy) {
  if (document.activeElement === state.active?.element) walk(towards(state.active, dx, dy));
  else walk(state.active);
}

const KEYS = [
  ["↑ ↓ ← →", "to the next node that way", { ArrowUp: () => arrow(0, -1), ArrowDown: () => arrow(0, 1), ArrowLeft: () => arrow(-1, 0), ArrowRight: () => arrow(1, 0) }],
  ["j k", "to the next node, the one before", { j: () => along(1), k: () => along(-1) }],
  ["Enter", "light the paths of this node; again: all edges", { Enter: enter, " ": enter }],
  ["Esc", "no node chosen", { Escape: () => { clearSearch(); choose(null); } }],
  ["[ ]", "fewer edges, more edges", { "[": () => threshold(state.step - stride()), "]": () => threshold(state.step + stride()) }],
  ["+ − 0", "larger, smaller, all", { "+": () => scaleBy(1.25), "=": () => scaleBy(1.25), "-": () => scaleBy(0.8), 0: fit }],
  ["/", "search", { "/": () => field.focus() }],
  ["t", "light or dark", { t: turn }],
  ["s", "save this view as SVG", { s: save }],
  ["?", "these keys", { "?": help }],
];
const ANSWERS = Object.assign({}, ...KEYS.map(([, , answers]) => answers));
const stride = () => Math.max(1, Math.round(steps.length / 40));

function enter() {
  const node = document.activeElement.closest(".node")?.__data__;
  if (node) choose(node === state.chosen ? null : node, { focus: true });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || el("help").open) return;
  const on = event.target;
  const own = on.closest?.("button, input") && ["Enter", " ", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"].includes(event.key);
  const answer = ANSWERS[event.key];
  if (!answer || own) return;
  event.preventDefault();
  answer();
});

function help() {
  const box = el("help");
  box.replaceChildren();
  add(box, "h2", "Keys");
  const list = add(box, "dl");
  for (const [keys, what] of KEYS) {
    const term = add(list, "dt");
    for (const key of keys.split(" ")) { add(term, "kbd", key); term.append(" "); }
    add(list, "dd", what);
  }
  add(box, "p", "Drag to move, scroll to zoom. The slider keeps the strongest edges by |score|, and of these what is still on a path from the inputs to the logits.");
  const close = add(add(box, "p"), "button", "Close");
  close.addEventListener("click", () => box.close());
  box.showModal();
}

// -- light, dark, files and paper ----------------------------------------------------------------

const system = matchMedia("(prefers-color-scheme: dark)");

function turn() {
  const style = document.documentElement.style;
  const dark = style.colorScheme ? style.colorScheme === "dark" : system.matches;
  style.colorScheme = dark ? "light" : "dark";
  recolour();
}

function recolour() {
  mix();
  paintMap();
}
system.addEventListener("change", recolour);

const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "opacity",
  "font-size", "font-weight", "text-anchor", "paint-order", "stroke-linejoin"];
const PLAIN = { "fill-opacity": "1", "stroke-opacity": "1", opacity: "1", "stroke-dasharray": "none", "paint-order": "normal", "stroke-linejoin": "miter", "font-weight": "400", "text-anchor": "start" };
const ILLEGAL = /[^\t\n\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu; // in XML

/** A copy of an element with its looks as attributes; colours are hex, so that every program reads them. */
function copy(element) {
  const style = getComputedStyle(element);
  if (style.visibility === "hidden" || style.display === "none") return null;
  const made = element.cloneNode(false);
  for (const name of ["class", "role", "tabindex", "aria-label", "aria-pressed", "id", "style", "visibility"]) made.removeAttribute(name);
  const leaf = ["path", "rect", "text"].includes(element.tagName);
  for (const name of leaf ? STYLES : ["opacity"]) {
    let value = style.getPropertyValue(name);
    if (value === PLAIN[name] || value === "") continue;
    if (name === "fill" || name === "stroke") value = value === "none" ? value : hex(value);
    if (element.tagName !== "text" && /font|anchor|paint/.test(name)) continue;
    if (name.startsWith("stroke-") && style.stroke === "none") continue;
    made.setAttribute(name, value);
  }
  for (const child of element.childNodes) {
    const inner = child.nodeType === 3 ? document.createTextNode(child.data.replace(ILLEGAL, "\ufffd")) : copy(child);
    if (inner) made.append(inner);
  }
  return made;
}

/** What the stage shows as one SVG element, with its title and legend. */
function picture(at, width, height) {
  const make = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text.replace(ILLEGAL, "\ufffd");
    return made;
  };
  const head = 48, foot = 50, font = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif";
  const all = height + head + foot;
  const svg = make("svg", { width, height: all, viewBox: `0 0 ${width} ${all}`, "font-family": font });
  svg.append(make("title", {}, data.title), make("rect", { width, height: all, fill: palette.paper }));
  const inner = make("svg", { y: head, width, height, viewBox: `0 0 ${width} ${height}` });
  for (const sheet of sheets) {
    const group = copy(sheet.firstElementChild);
    group.setAttribute("transform", `translate(${at.x} ${at.y}) scale(${at.k})`);
    if (sheet.classList.contains("dim")) group.setAttribute("opacity", "0.1");
    inner.append(group);
  }
  inner.append(copy(el("names")));
  svg.append(inner,
    make("text", { x: 16, y: 22, "font-size": 15, "font-weight": 600, fill: palette.ink }, data.title),
    make("text", { x: 16, y: 39, "font-size": 11, fill: palette.muted }, subtitle()));
  let x = 16;
  const y = all - 30;
  for (const [colour, wide, word] of data.samples) {
    svg.append(make("line", { x1: x, x2: x + 24, y1: y - 4, y2: y - 4, stroke: palette[colour], "stroke-width": wide }),
      make("text", { x: x + 30, y, "font-size": 11, fill: palette.muted }, word));
    x += 52 + 6.2 * word.length;
  }
  svg.append(make("text", { x: 16, y: all - 12, "font-size": 11, fill: palette.muted }, data.legend));
  return svg;
}

function save() {
  const text = new XMLSerializer().serializeToString(picture(state.at, stage.clientWidth, stage.clientHeight));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`<?xml version="1.0" encoding="utf-8"?>\n${text}\n`], { type: "image/svg+xml" }));
  link.download = `${data.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "circuit"}.svg`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  say(`Saved as ${link.download}`);
}

/** Paper gets the whole circuit, light, on one sheet. */
function toPaper() {
  const style = document.documentElement.style, before = [style.colorScheme, state.at];
  style.colorScheme = "light";
  mix();
  const width = RIGHT - LEFT + 100, height = BOTTOM - TOP + (data.lanes.length ? 60 : 20);
  state.at = d3.zoomIdentity.translate(80 - LEFT, 10 - TOP);
  placeNames(height);
  el("paper").replaceChildren(picture(state.at, width, height));
  [style.colorScheme, state.at] = before;
  mix();
  placeNames();
}
addEventListener("beforeprint", toPaper);
addEventListener("afterprint", () => el("paper").replaceChildren());

// -- words ---------------------------------------------------------------------------------------

function subtitle() {
  const total = ranked.length + data.left_out;
  return data.source + (data.left_out ? ` · shown: the strongest ${ranked.length.toLocaleString("en")} of ${total.toLocaleString("en")}` : "");
}

function words() {
  el("title").textContent = data.title;
  el("source").textContent = el("source").title = subtitle();
  sheets[2].setAttribute("aria-label", `Circuit with ${nodes.length} nodes and ${ranked.length} edges, inputs at the bottom`);
  data.prompt.forEach((token, i) => {
    const chip = add(el("prompt"), data.by_token ? "button" : "span", token.replaceAll("\n", "⏎"), "token");
    chip.title = `position ${i}`;
    add(chip, "sub", String(i));
    if (data.by_token) chip.addEventListener("click", () => atToken(i, chip));
  });
  const box = el("legend");
  data.samples.forEach(([colour, wide, word], i) => {
    const item = add(box, "span", undefined, i > 1 ? "wide" : "");
    item.innerHTML = `<svg width="24" height="8" aria-hidden="true"><line x1="0" x2="24" y1="4" y2="4" stroke="var(--${colour})" stroke-width="${wide}"/></svg>`;
    item.append(word);
  });
  const scale = add(box, "span", undefined, "wide");
  scale.append(`−${signed(data.limit).slice(1)}`);
  add(scale, "i", undefined, "scale");
  scale.append(`+${signed(data.limit).slice(1)}`);
  const note = add(box, "span", data.legend, "wide note");
  note.title = data.legend;
}

/** Marks the nodes at a position of the prompt. */
function atToken(pos, chip) {
  const on = !chip.classList.contains("on");
  clearSearch();
  chip.classList.toggle("on", on);
  if (on) choose(null);
  if (on) state.sought = (node) => node.pos === pos;
  paintChoice();
}

// -- and so it begins ----------------------------------------------------------------------------

el("fit").addEventListener("click", fit);
el("theme").addEventListener("click", turn);
el("save").addEventListener("click", save);
el("keys").addEventListener("click", help);

words();
mix();
paintBands();
paintNodes();
bounds();
threshold(state.step);
fit();
document.documentElement.dataset.ready = "true";
