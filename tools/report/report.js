"use strict";

// The page's script. Texts of the data reach the page as textContent only, never as HTML.

const PAGE = 48; // samples a page
const MISSING = [150, 150, 150]; // colour of a missing image
const RIM = [255, 255, 255]; // just outside a contour, so that it shows on any background
const STRIPES = [0.6, 0.25]; // opacities of a filled mask: stripes show on an object of its colour
const LARGE = 1000; // longer side of the large view, pixels

const data = JSON.parse(document.getElementById("data").textContent);
const column = data.columns;
const total = column.image.length;
const compared = "other" in column;
// Where expressions may refer to nothing, the page has the IoU: 1 for a missing target that was
// predicted to be missing.
const iou = column.iou ??
  column.union.map((union, i) => (union ? column.intersection[i] / union : 0));
const otherIou = compared && (column.other_iou ??
  column.other_pixels.map((p) => p && (p[1] ? p[0] / p[1] : 0)));
const delta = compared ? otherIou.map((other, i) => (other === null ? null : iou[i] - other)) : [];
const words = column.sentence.map((sentence, i) =>
  `${sentence} ${imageOf(i).file}`.toLowerCase());

const $ = (selector) => document.querySelector(selector);
const state = { page: 0, order: [], bin: null, overlay: "both", preset: "all", open: -1 };

const PRESETS = {
  all: { name: "All", low: 0, high: 1 },
  failures: { name: "Failures < 0.1", low: 0, high: 0.1 },
  near: { name: "Near misses 0.4–0.5", low: 0.4, high: 0.5 },
  successes: { name: "Successes ≥ 0.9", low: 0.9, high: 1 },
  ...(compared && {
    worse: { name: "Got worse", low: 0, high: 1, keep: (i) => delta[i] !== null && delta[i] < 0, sort: "worse" },
    better: { name: "Got better", low: 0, high: 1, keep: (i) => delta[i] !== null && delta[i] > 0, sort: "better" },
  }),
};
const OVERLAYS = {
  both: "Both", truth: "Ground truth", prediction: "Prediction", ...(compared && { other: "Compared" }), none: "Image",
};
const by = (key) => (a, b) => key(a) - key(b) || a - b; // ties stay in the record's order
const SORTS = {
  record: { name: "as recorded", compare: (a, b) => a - b },
  low: { name: "lowest IoU first", compare: by((i) => iou[i]) },
  high: { name: "highest IoU first", compare: by((i) => -iou[i]) },
  ref: { name: "by reference", compare: by((i) => column.ref_id[i]) },
  ...(compared && {
    worse: { name: "most worse first", compare: by((i) => delta[i] ?? 9) },
    better: { name: "most better first", compare: by((i) => -(delta[i] ?? -9)) },
  }),
};

function imageOf(i) {
  return data.images[column.image[i]];
}

function element(tag, text, css) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (css) made.className = css;
  return made;
}

// ---- masks and images ----

// COCO's compressed run lengths: 5 bits a character, differences to the run before the last.
function runLengths(counts) {
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, bits;
    do {
      bits = counts.charCodeAt(at++) - 48;
      value += (bits & 31) * 2 ** shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value -= 2 ** shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

// A mask at another size, row by row: 1 = inside. Runs go down the columns.
function maskAt(counts, image, width, height) {
  const whole = new Uint8Array(image.width * image.height);
  let from = 0;
  runLengths(counts).forEach((run, i) => {
    if (i % 2) whole.fill(1, from, from + run);
    from += run;
  });
  const mask = new Uint8Array(width * height);
  for (let x = 0; x < width; x++) {
    const start = Math.floor((x + 0.5) * image.width / width) * image.height;
    for (let y = 0; y < height; y++) {
      mask[y * width + x] = whole[start + Math.floor((y + 0.5) * image.height / height)];
    }
  }
  return mask;
}

// Pixels of a region within `thick` steps of its outside. `edge`: whether pixels outside the image count as outside.
function contour(mask, width, height, thick, edge) {
  const line = new Uint8Array(mask.length);
  let front = [];
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      if (!mask[at]) continue;
      const inner = (x > 0 ? mask[at - 1] : !edge) && (x < width - 1 ? mask[at + 1] : !edge) &&
        (y > 0 ? mask[at - width] : !edge) && (y < height - 1 ? mask[at + width] : !edge);
      if (!inner) { line[at] = 1; front.push(at); }
    }
  }
  for (let step = 1; step < thick; step++) {
    const next = [];
    const grow = (at) => {
      if (mask[at] && !line[at]) { line[at] = 1; next.push(at); }
    };
    for (const at of front) {
      const x = at % width;
      if (x > 0) grow(at - 1);
      if (x < width - 1) grow(at + 1);
      grow(at - width); // beyond the first and last row there is nothing
      grow(at + width);
    }
    front = next;
  }
  return line;
}

// Mix a colour into a region; `opacity` of the pixel at x, y.
function blend(image, region, color, opacity) {
  const pixels = image.data;
  for (let at = 0; at < region.length; at++) {
    if (!region[at]) continue;
    const alpha = opacity(at % image.width, Math.floor(at / image.width));
    for (let c = 0; c < 3; c++) {
      pixels[4 * at + c] += (color[c] - pixels[4 * at + c]) * alpha;
    }
  }
}

// What is drawn over the image of a sample, in order: run lengths, colour, filled or not.
function layers(i) {
  const truth = { counts: column.truth_masks[column.truth[i]], color: data.colors.truth };
  const found = { counts: column.prediction[i], color: data.colors.prediction, filled: true };
  switch (state.overlay) {
    case "truth": return [{ ...truth, filled: true }];
    case "prediction": return [found];
    case "other": return column.other[i] === null ? [truth] : [{ ...found, counts: column.other[i] }, truth];
    case "none": return [];
    default: return [found, truth];
  }
}

async function loadImage(i) {
  const packed = document.getElementById(`image-${column.image[i]}`);
  if (!packed) return null;
  const bitmap = new Image();
  bitmap.src = `data:bitmap/jpeg;base64,${packed.textContent}`;
  await bitmap.decode();
  return bitmap;
}

// Draw a sample; `side` is the longer side in pixels, 0 for the embedded image's own.
async function draw(canvas, i, side) {
  const token = canvas.token = {};
  delete canvas.dataset.drawn;
  const bitmap = await loadImage(i);
  if (canvas.token !== token) return; // another sample was asked for meanwhile
  const image = imageOf(i);
  const shape = bitmap || { width: image.width, height: image.height };
  const scale = (side || (bitmap ? Math.max(shape.width, shape.height) : 320)) / Math.max(shape.width, shape.height);
  const width = Math.max(1, Math.round(shape.width * scale));
  const height = Math.max(1, Math.round(shape.height * scale));
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (bitmap) {
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
  } else {
    context.fillStyle = `rgb(${MISSING})`;
    context.fillRect(0, 0, width, height);
  }
  const canvasData = context.getImageData(0, 0, width, height);
  const thick = Math.max(1, Math.round(Math.max(width, height) / 180));
  const rim = Math.ceil(thick / 3), stripe = 2 * thick;
  for (const layer of layers(i)) {
    const mask = maskAt(layer.counts, image, width, height);
    const outside = mask.map((v) => 1 - v);
    if (layer.filled) blend(canvasData, mask, layer.color, (x, y) => STRIPES[Math.floor((x + y) / stripe) % 2]);
    blend(canvasData, contour(outside, width, height, rim, false), RIM, () => 1);
    blend(canvasData, contour(mask, width, height, thick, true), layer.color, () => 1);
  }
  context.putImageData(canvasData, 0, 0);
  canvas.dataset.drawn = i;
}

// ---- filters ----

function matches() {
  const terms = $("#text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const refs = terms.filter((t) => /^#\d+$/.test(t)).map((t) => Number(t.slice(1)));
  const texts = terms.filter((t) => !/^#\d+$/.test(t));
  const low = Number($("#low").value), high = $("#high").value === "" ? 1 : Number($("#high").value);
  const chosen = ["split", "category", "kind"].map((name) => [column[name], $(`#${name}`).value])
    .filter(([, value]) => value !== "");
  const keep = PRESETS[state.preset]?.keep;
  const bin = state.bin && column.bins[state.bin.key];
  return (i) =>
    iou[i] >= low && (iou[i] < high || high >= 1) &&
    chosen.every(([values, value]) => values[i] === Number(value)) &&
    (!bin || bin[i] >> state.bin.index & 1) &&
    (!keep || keep(i)) &&
    refs.every((ref) => column.ref_id[i] === ref) &&
    texts.every((text) => words[i].includes(text));
}

function apply() {
  const keep = matches();
  state.order = [];
  for (let i = 0; i < total; i++) if (keep(i)) state.order.push(i);
  state.order.sort(SORTS[$("#sort").value].compare);
  state.page = 0;
  show();
}

function choosePreset(name) {
  state.preset = name;
  $("#low").value = PRESETS[name].low;
  $("#high").value = PRESETS[name].high;
  if (PRESETS[name].sort) $("#sort").value = PRESETS[name].sort;
  apply();
}

// From a chart: an IoU range, or a group of a breakdown.
function chooseBin(text, split) {
  const [key, ...rest] = text.split(":");
  state.bin = null;
  if (key === "iou") {
    state.preset = "";
    [$("#low").value, $("#high").value] = rest.map(Number);
  } else {
    state.bin = { key, index: Number(rest[0]) };
    choosePreset("all");
  }
  $("#split").value = split === "" ? "" : column.split_names.indexOf(split);
  apply();
  $("#gallery").scrollIntoView();
}

// ---- the gallery ----

const signed = (x) => `${x >= 0 ? "+" : "−"}${Math.abs(x).toFixed(3)}`;

function gauge(i) {
  const made = element("div", undefined, "gauge");
  const bar = element("i");
  bar.style.setProperty("--part", `${100 * iou[i]}%`);
  const change = compared && delta[i] !== null ? ` (${signed(delta[i])})` : "";
  made.append(element("span", `IoU ${iou[i].toFixed(3)}${change}`), bar);
  return made;
}

function expressionOf(i, tag) {
  const made = element(tag, column.sentence[i] || "(no words)", "expression");
  made.dir = "auto"; // right-to-left scripts; it also keeps their marks inside
  return made;
}

function metaOf(i) {
  const kind = column.kind_names[column.kind[i]];
  const parts = [column.category_names[column.category[i]], kind, `ref ${column.ref_id[i]}`];
  if (column.split_names.length > 1) parts.push(column.split_names[column.split[i]]);
  return parts.filter(Boolean).join(" · ");
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target, Number(entry.target.dataset.sample), 0);
  }
}, { rootMargin: "400px" });

function card(i) {
  const made = element("button", undefined, "card");
  made.type = "button";
  made.dataset.sample = i;
  const canvas = element("canvas");
  canvas.dataset.sample = i;
  const text = element("div", undefined, "text");
  const file = element("div", undefined, "meta file");
  file.append(element("bdi", imageOf(i).file));
  text.append(gauge(i), expressionOf(i, "div"), element("div", metaOf(i), "meta"), file);
  made.append(canvas, text);
  made.addEventListener("click", () => openLarge(i));
  seen.observe(canvas);
  return made;
}

function show() {
  const pages = Math.max(1, Math.ceil(state.order.length / PAGE));
  const here = state.order.slice(state.page * PAGE, (state.page + 1) * PAGE);
  seen.disconnect();
  $("#cards").replaceChildren(...here.map(card));
  if (!here.length) $("#cards").append(element("p", "No sample meets all conditions."));
  $("#count").value = `${state.order.length.toLocaleString("en")} of ${total.toLocaleString("en")} samples`;
  $("#page").textContent = `Page ${state.page + 1} of ${pages}`;
  $("#previous").disabled = state.page === 0;
  $("#next").disabled = state.page >= pages - 1;
  press("#presets", state.preset);
  press(".overlay", state.overlay);
  $("#legend-prediction").textContent = state.overlay === "other" ? "compared prediction" : "prediction";
  $("#bin").hidden = !state.bin;
  if (state.bin) {
    const group = data.groups[state.bin.key];
    $("#bin").textContent = `${group.title}: ${group.labels[state.bin.index]} ✕`;
  }
}

function turn(by) {
  const last = Math.ceil(state.order.length / PAGE) - 1;
  const page = Math.min(Math.max(0, state.page + by), Math.max(0, last));
  if (page === state.page) return;
  state.page = page;
  show();
  $("#gallery").scrollIntoView();
}

function chooseOverlay(name) {
  state.overlay = name;
  show();
  if (state.open >= 0) draw($("#large canvas"), state.open, LARGE);
}

// ---- the large view ----

function targetOf(i) {
  const [truth, predicted] = column.no_target[i].map((none) => (none ? "none" : "some"));
  return `${truth}; predicted: ${predicted}`;
}

function facts(i) {
  const image = imageOf(i), kind = column.kind_names[column.kind[i]];
  const other = compared && delta[i] !== null ? signed(delta[i]) : null;
  return [
    ["IoU", iou[i].toFixed(4)],
    ["change", other],
    ["target", column.no_target && targetOf(i)],
    ["pixels", `${column.intersection[i].toLocaleString("en")} of ${column.union[i].toLocaleString("en")}`],
    ["score", column.score[i].toFixed(3)],
    ["category", column.category_names[column.category[i]]],
    ["others of it", column.same_category[i]],
    ["kind", kind],
    ["split", column.split_names[column.split[i]]],
    ["reference", column.ref_id[i]],
    ["expression", column.sent_ids[i].join(", ")],
    ["annotation", column.ann_ids[i].join(", ") || "none"],
    ["image", image.file],
    ["size", `${image.width} × ${image.height}`],
  ].filter(([, value]) => value !== null && value !== undefined);
}

function siblings(i) {
  const same = [];
  for (let k = 0; k < total; k++) {
    if (k !== i && column.ref_id[k] === column.ref_id[i] && column.split[k] === column.split[i]) same.push(k);
  }
  return same;
}

function openLarge(i) {
  state.open = i;
  const place = state.order.indexOf(i);
  $("#large-place").textContent = place < 0 ? "" : `${(place + 1).toLocaleString("en")} of ${state.order.length.toLocaleString("en")}`;
  $("#large-previous").disabled = place <= 0;
  $("#large-next").disabled = place < 0 || place >= state.order.length - 1;
  const title = $("#large h3");
  title.textContent = column.sentence[i] || "(no words)";
  title.dir = "auto";
  $("#large dl").replaceChildren(...facts(i).flatMap(([name, value]) => {
    const shown = element("dd");
    shown.append(element("bdi", value));
    return [element("dt", name), shown];
  }));
  const same = siblings(i);
  $("#siblings").replaceChildren(...same.map((k) => {
    const made = element("button");
    made.type = "button";
    made.append(gauge(k), expressionOf(k, "span"));
    made.addEventListener("click", () => openLarge(k));
    return made;
  }));
  if (same.length) $("#siblings").prepend(element("p", "Other expressions of the object", "faint"));
  if (!$("#large").open) $("#large").showModal();
  draw($("#large canvas"), i, LARGE);
}

function step(by) {
  const place = state.order.indexOf(state.open);
  if (place >= 0 && place + by in state.order) openLarge(state.order[place + by]);
}

function closeLarge() {
  const place = state.order.indexOf(state.open);
  const page = Math.floor(place / PAGE);
  if (place >= 0 && page !== state.page) {
    state.page = page;
    show();
  }
  document.querySelector(`.card[data-sample="${state.open}"]`)?.focus();
  state.open = -1;
}

// ---- controls ----

function press(group, value) {
  for (const button of document.querySelectorAll(`${group} button`)) {
    button.setAttribute("aria-pressed", button.value === value);
  }
}

function addButtons(groups, names, choose) {
  for (const group of document.querySelectorAll(groups)) {
    for (const [value, name] of Object.entries(names)) {
      const button = element("button", name);
      button.type = "button";
      button.value = value;
      button.addEventListener("click", () => choose(value));
      group.append(button);
    }
  }
}

function addOptions(select, options, all) {
  if (all) select.append(new Option(all, ""));
  for (const [value, name] of options) select.append(new Option(name, value));
}

// Values with their numbers; hidden where there is nothing to choose.
function addChoice(name, all) {
  const values = column[`${name}_names`], counts = values.map(() => 0);
  for (const number of column[name]) counts[number]++;
  const options = values.map((value, n) => [n, `${value ?? "unknown"} (${counts[n].toLocaleString("en")})`]);
  if (name === "category") options.sort((a, b) => a[1].localeCompare(b[1]));
  addOptions($(`#${name}`), options, all);
  $(`#${name}`).hidden = values.length < 2;
}

function onKey(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const move = state.open >= 0 ? step : turn;
  const keys = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1),
    "/": () => state.open < 0 && $("#text").focus(),
    t: () => chooseOverlay("truth"), p: () => chooseOverlay("prediction"), b: () => chooseOverlay("both"),
  };
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function setUp() {
  for (const name of ["truth", "prediction"]) {
    document.documentElement.style.setProperty(`--${name}`, `rgb(${data.colors[name]})`);
  }
  addButtons("#presets", Object.fromEntries(Object.entries(PRESETS).map(([k, p]) => [k, p.name])), choosePreset);
  addButtons(".overlay", OVERLAYS, chooseOverlay);
  addChoice("category", "all categories");
  addChoice("split", "all splits");
  addChoice("kind", "all kinds");
  addOptions($("#sort"), Object.entries(SORTS).map(([k, s]) => [k, s.name]));
  for (const id of ["text", "category", "split", "kind", "sort"]) $(`#${id}`).addEventListener("input", apply);
  for (const id of ["low", "high"]) {
    $(`#${id}`).addEventListener("input", () => { state.preset = ""; apply(); });
  }
  $("#filters").addEventListener("submit", (event) => event.preventDefault());
  $("#previous").addEventListener("click", () => turn(-1));
  $("#next").addEventListener("click", () => turn(1));
  $("#bin").addEventListener("click", () => { state.bin = null; apply(); });
  $("#large-previous").addEventListener("click", () => step(-1));
  $("#large-next").addEventListener("click", () => step(1));
  $("#large-close").addEventListener("click", () => $("#large").close());
  $("#large").addEventListener("close", closeLarge);
  $("#large").addEventListener("click", (event) => event.target === $("#large") && $("#large").close());
  document.addEventListener("keydown", onKey);
  setUpCharts();
  choosePreset("all");
}

function setUpCharts() {
  const sets = [...document.querySelectorAll(".charts")];
  const select = $("#charts-split select");
  addOptions(select, sets.slice(1).map((set) => [set.dataset.split, set.dataset.split]), "all");
  $("#charts-split").hidden = sets.length < 2;
  select.addEventListener("input", () => {
    for (const set of sets) set.hidden = set.dataset.split !== select.value;
  });
  for (const bin of document.querySelectorAll(".bin")) {
    bin.setAttribute("tabindex", "0");
    bin.setAttribute("role", "button");
    bin.setAttribute("aria-label", bin.querySelector("title").textContent);
    const choose = () => chooseBin(bin.dataset.bin, bin.closest(".charts").dataset.split);
    bin.addEventListener("click", choose);
    bin.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
    });
  }
}

setUp();
