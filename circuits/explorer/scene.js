// What is painted. Four sheets lie over each other and show the same part of the circuit: bands,
// edges, nodes (with what is lit below them), and what must be crisp while the others move.
"use strict";

const stage = document.getElementById("stage");
const sheets = ["ground", "edges", "front"].map((id) => document.getElementById(id));
const RIM = 160; // pixels around the stage that are painted too, so that moving shows no gap
const [LEFT, TOP, RIGHT, BOTTOM] = data.frame;
const [BOX_WIDTH, BOX_HEIGHT] = data.box;

const isPill = (node) => !["head", "kv"].includes(node.kind);

/** The largest size of letters with which a label fits into its box; round ends leave less room. */
const fits = (letters, pill) => (BOX_WIDTH - (pill ? 10 : 4)) / (0.6 * Math.max(pill ? 6 : 1, letters));

// No circuit opens smaller: the longest labels, but for odd ones, have eight pixels at this scale.
const READABLE = Math.min(1, 8.1 / Math.min(...nodes.map((node) => fits(Math.min(8, node.label.length), isPill(node)))));
document.documentElement.style.setProperty("--rim", `${RIM}px`);

/** The last step with at most so many edges as a circuit opens with. */
function opening() {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (real(strongest(steps[middle])).length <= data.open) low = middle; else high = middle - 1;
  }
  return low;
}

const state = {
  step: opening(), // of the slider
  shown: [], // edges
  chosen: null, // node
  sought: null, // says of a node whether it is searched for
  hits: null, // nodes that are, of those that are shown
  active: null, // the node that Tab comes to
  at: d3.zoomIdentity, // where the circuit is on the stage
  painted: d3.zoomIdentity, // where it was when the sheets were painted
};

// -- once ----------------------------------------------------------------------------------------

const curve = ([a, b, c, d, e, f, g, h]) => `M${a} ${b}C${c} ${d} ${e} ${f} ${g} ${h}`;
const dressed = (edge) => `edge ${edge.kin ? "kin" : sign(edge.score) || "positive"}`;

function paintBands() {
  const ground = d3.select("#ground > g");
  ground.selectAll(".band").data(data.bands).join("rect").attr("class", "band").attr("rx", 8)
    .attr("x", LEFT - 70).attr("width", RIGHT - LEFT + 80)
    .attr("y", (band) => band.low).attr("height", (band) => band.high - band.low);
  ground.selectAll(".lane").data(data.lanes).join("rect").attr("class", "lane").attr("rx", 8)
    .attr("y", TOP).attr("height", BOTTOM - TOP + 24)
    .attr("x", (lane) => lane.low + 3).attr("width", (lane) => lane.high - lane.low - 6);
  d3.select("#names").append("rect").attr("class", "shelf").attr("height", 24); // below names of lanes
  d3.select("#names").selectAll(".layer").data(data.bands).join("text")
    .attr("class", "layer").text((band) => band.label);
  d3.select("#names").selectAll(".lane").data(data.lanes).join("text")
    .attr("class", "lane");
}

function paintNodes() {
  const groups = d3.select("#nodes").selectAll("g").data(nodes, (node) => node.id).join("g");
  groups.attr("class", (node) => `node ${node.kind}${Math.abs(node.share) > 0.62 ? " strong" : ""}`)
    .attr("transform", (node) => `translate(${node.x} ${node.y})`)
    .attr("role", "button").attr("tabindex", -1).attr("aria-pressed", "false")
    .each(function (node) { node.element = this; });
  for (const part of ["box", "tint"]) {
    groups.append("rect").attr("class", (node) => `${part} ${part === "tint" ? sign(node.share) : ""}`)
      .attr("x", -BOX_WIDTH / 2).attr("y", -BOX_HEIGHT / 2)
      .attr("width", BOX_WIDTH).attr("height", BOX_HEIGHT)
      .attr("rx", (node) => (isPill(node) ? BOX_HEIGHT / 2 : 6));
  }
  groups.select(".tint").attr("fill-opacity", (node) => 0.85 * Math.abs(node.share));
  groups.append("text").attr("class", "label").text((node) => node.label);
  groups.selectAll(".slot").data((node) => node.slots).join("text").attr("class", "slot")
    .attr("x", (slot) => data.ports[slot]).attr("y", BOX_HEIGHT / 2 - 3.5).text((slot) => slot);
}

// -- when something changes ----------------------------------------------------------------------

/** Puts the edges of the slider's step on the sheet, and takes the others away. */
function paintEdges() {
  state.shown = strongest(steps[state.step]);
  d3.select("#edges > g").selectAll("path").data(state.shown, (edge) => edge.number)
    .join((entering) => entering.append("path")
      .attr("d", (edge) => curve(edge.curve)).attr("class", dressed)
      .attr("stroke-width", wide(0.4)).attr("stroke-opacity", (edge) => edge.opacity))
    .order();
  for (const node of nodes) Object.assign(node, { used: false, heard: 0, said: 0 });
  for (const { from, to, kin } of state.shown) {
    from.used = to.used = true;
    if (!kin) { to.heard += 1; from.said += 1; }
  }
  if (state.chosen && !state.chosen.used) state.chosen = null;
  if (!state.active?.used) state.active = nodes.find((node) => node.used) ?? null;
  d3.selectAll(".node").attr("visibility", (node) => (node.used ? null : "hidden"))
    .attr("aria-label", described);
  paintChoice();
  paintMap();
}

/** Lights the paths of the chosen node, or what is between the nodes that are searched for, and dims
the others. */
function paintChoice() {
  const { chosen, sought } = state;
  const hits = state.hits = sought && new Set(nodes.filter((node) => node.used && sought(node)));
  const among = (edge) => hits.has(edge.from) && hits.has(edge.to);
  const lit = hits ? state.shown.filter(among) : chosen ? paths(chosen, state.shown) : [];
  const on = new Set(hits ?? (chosen ? [chosen, ...lit.flatMap((edge) => [edge.from, edge.to])] : nodes));
  sheets[1].classList.toggle("dim", chosen !== null || hits !== null);
  d3.select("#lit").selectAll("path").data(lit, (edge) => edge.number).join("path")
    .attr("d", (edge) => curve(edge.curve)).attr("class", dressed)
    .attr("stroke-opacity", (edge) => (edge.from === chosen || edge.to === chosen ? 1 : 0.6 * edge.opacity))
    .attr("stroke-width", wide(1.5)).order();
  d3.selectAll(".node").classed("dim", (node) => !on.has(node))
    .classed("hit", (node) => hits?.has(node) ?? false)
    .classed("chosen", (node) => node === chosen)
    .attr("aria-pressed", (node) => String(node === chosen))
    .attr("tabindex", (node) => (node === state.active ? 0 : -1));
  return lit;
}

/** The width of an edge, at least so many pixels at the scale of now. */
const wide = (least) => (edge) => Math.max(edge.width, least / state.painted.k).toFixed(2);

/** Edges can be seen at any scale, lit ones well. */
function thicken() {
  d3.selectAll("#edges path").attr("stroke-width", wide(0.4));
  d3.selectAll("#lit path").attr("stroke-width", wide(1.5));
}

/** Labels grow as the circuit shrinks, as far as their boxes allow, and slots make room for them. */
function label() {
  const far = state.painted.k < 0.62; // slots could not be read
  sheets[2].classList.toggle("far", far);
  d3.selectAll(".node").each(function (node) {
    const size = Math.min(fits(node.label.length, isPill(node)), Math.max(13, 9.5 / state.painted.k));
    const drop = far ? 0.36 * size : node.slots.length ? 0.5 : 4.5;
    d3.select(this).select(".label").attr("font-size", size.toFixed(2)).attr("y", drop.toFixed(2));
  });
}

// -- where it is on the stage --------------------------------------------------------------------

/** Moves the sheets as they are; they are painted anew once nothing has moved for a moment. */
function place() {
  const { at, painted } = state;
  const k = at.k / painted.k;
  const moved = `translate(${at.x - painted.x * k}px, ${at.y - painted.y * k}px) scale(${k})`;
  for (const sheet of sheets) sheet.style.transform = moved;
  placeNames();
  paintMap();
  clearTimeout(place.later);
  place.later = setTimeout(settle, 120);
}

/** Paints the sheets where they are. */
function settle() {
  clearTimeout(place.later);
  const { at } = state;
  const scaled = at.k !== state.painted.k || !settle.done;
  state.painted = at;
  settle.done = true;
  for (const sheet of sheets) {
    sheet.style.transform = "none";
    sheet.firstElementChild.setAttribute("transform", `translate(${at.x + RIM} ${at.y + RIM}) scale(${at.k})`);
  }
  if (scaled) { label(); thicken(); }
  placeNames();
}

/** Names of layers keep to the left edge of what is seen, those of lanes to its lower edge. */
function placeNames(height = stage.clientHeight) {
  const { at } = state, low = at.applyY(BOTTOM + 24) + 14, x = Math.max(10, at.applyX(LEFT - 58));
  d3.selectAll("#names .layer").attr("x", x)
    .attr("y", (band) => at.applyY((band.low + band.high) / 2) + 4);
  d3.selectAll("#names .lane").attr("y", Math.min(height - 8, low))
    .attr("x", (lane) => at.applyX((lane.low + lane.high) / 2))
    .text((lane) => cut(lane.label, ((lane.high - lane.low) * at.k) / 7));
  d3.selectAll("#names .shelf").attr("y", height - 24).attr("width", stage.clientWidth)
    .attr("visibility", data.lanes.length && low > height ? null : "hidden");
  d3.select("#touched").attr("transform", at.toString());
}

/** So many letters of a text, or none if they are too few to be read. */
function cut(text, letters) {
  return text.length <= letters ? text : letters < 3 ? "" : `${text.slice(0, letters - 1)}…`;
}

/** The whole circuit if it can be read so, else its upper end. */
function fitted() {
  const width = stage.clientWidth, height = stage.clientHeight, names = 70;
  const under = data.lanes.length ? 56 : 16; // names of lanes
  const whole = Math.min(width / (RIGHT - LEFT + names + 20), height / (BOTTOM - TOP + under));
  const k = Math.min(1.4, Math.max(READABLE, whole));
  const room = width - k * (RIGHT - LEFT + names + 20); // below 0: the first output is in the middle
  const middle = room < 0 ? outputs[0].x : (LEFT - names + RIGHT) / 2;
  const left = k * (names - LEFT); // where the circuit begins at the left edge of the stage
  const x = room < 0 ? Math.min(left, Math.max(left + room, width / 2 - k * middle)) : width / 2 - k * middle;
  const tall = k * (BOTTOM - TOP + under) > height;
  const y = tall ? 8 - k * TOP : height / 2 - (k * (TOP + BOTTOM + under - 16)) / 2;
  return d3.zoomIdentity.translate(x, y).scale(k);
}

// -- colours --------------------------------------------------------------------------------------

/** `rgb(1, 2, 3)` as `#010203`. */
function hex(colour) {
  const parts = colour.match(/[\d.]+/g)?.slice(0, 3).map(Number) ?? [0, 0, 0];
  return "#" + parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("");
}

const palette = {};

/** Reads the colours of the page, light or dark as it is now. */
function mix() {
  const probe = document.body.appendChild(document.createElement("i"));
  for (const name of ["paper", "ink", "muted", "positive", "negative", "neutral", "chosen"]) {
    probe.style.color = `var(--${name})`;
    palette[name] = hex(getComputedStyle(probe).color);
  }
  probe.remove();
}

// -- overview ------------------------------------------------------------------------------------

const map = document.getElementById("map");
const MAP = Math.min(150 / (RIGHT - LEFT), 190 / (BOTTOM - TOP)); // its scale

const narrow = () => stage.clientWidth <= 560; // the panel then lies along the lower edge

/** All nodes, small, and what of them is on the stage; hidden while all are. */
function paintMap() {
  const { at } = state, [x0, y0] = at.invert([0, 0]), [x1, y1] = at.invert([stage.clientWidth, stage.clientHeight]);
  const all = nodes.every((node) => !node.used || (node.x > x0 && node.x < x1 && node.y > y0 && node.y < y1));
  map.hidden = all || (state.chosen !== null && narrow());
  if (map.hidden) return;
  const width = Math.max(40, (RIGHT - LEFT) * MAP), height = Math.max(40, (BOTTOM - TOP) * MAP);
  const dots = devicePixelRatio;
  if (map.style.width !== `${width}px` || map.width !== Math.round(width * dots)) {
    Object.assign(map, { width: Math.round(width * dots), height: Math.round(height * dots) });
    Object.assign(map.style, { width: `${width}px`, height: `${height}px` });
  }
  const pen = map.getContext("2d");
  const left = width / 2 - ((LEFT + RIGHT) / 2) * MAP, top = height / 2 - ((TOP + BOTTOM) / 2) * MAP;
  const rectangle = (x, y, right, bottom) => [left + x * MAP, top + y * MAP, (right - x) * MAP, (bottom - y) * MAP];
  pen.setTransform(dots, 0, 0, dots, 0, 0);
  pen.clearRect(0, 0, width, height);
  for (const node of nodes) {
    if (!node.used) continue;
    pen.fillStyle = palette[node === state.chosen ? "chosen" : sign(node.share) || "neutral"];
    pen.globalAlpha = node === state.chosen ? 1 : 0.4 + 0.6 * Math.abs(node.share);
    pen.fillRect(...rectangle(node.x - BOX_WIDTH / 2, node.y - BOX_HEIGHT / 2, node.x + BOX_WIDTH / 2, node.y + BOX_HEIGHT / 2));
  }
  const [x, y, w, h] = rectangle(x0, y0, x1, y1);
  const [from, to] = [Math.max(1, x), Math.min(width - 1, x + w)], [high, low] = [Math.max(1, y), Math.min(height - 1, y + h)];
  pen.globalAlpha = 0.12;
  pen.fillStyle = palette.chosen;
  pen.fillRect(from, high, to - from, low - high);
  pen.globalAlpha = 1;
  pen.strokeStyle = palette.chosen;
  pen.lineWidth = 1.5;
  pen.strokeRect(from, high, to - from, low - high);
}
