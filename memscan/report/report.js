const PAGE = 24, PRINTED = 100;
const byId = (id) => document.getElementById(id);
const form = byId("controls"), list = byId("cards");
if (!form || !list) return;
const parsed = (id) => JSON.parse(byId(id).textContent);
const data = parsed("data");
let pictures = null; // some megabytes: read when the first card is drawn
const count = data.id.length;
const state = { order: [], page: 0, ready: false };
const number = (value) => value.toLocaleString("en");
const score = (value) => (value === null || value === undefined ? "n/a" : value.toFixed(2));
const plural = (value, one, many) => `${number(value)} ${value === 1 ? one : many}`;

// Everything below is set as text or as an attribute that cannot run: no string of the data is ever read as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}
const isolated = (text) => make("bdi", {}, text);

function referenceLink(number_, text) {
  const shown = isolated(text === undefined ? data.references[number_] : text);
  if (!data.linked[number_]) return shown;
  return make("a", { href: data.urls[number_], rel: "noreferrer noopener nofollow", target: "_blank" }, shown);
}

// --- filter and sort -------------------------------------------------------------------------------------------
let haystack = null;
function searchable() {
  haystack ||= data.id.map((id, row) =>
    [data.caption[row], id, ...data.matches[row].map((one) => data.references[one])].join("\n").toLowerCase());
  return haystack;
}

function numbers(name) {
  if (name.startsWith("signal:")) {
    const signal = name.slice(7);
    return data.signals.map((row) => (row[signal] === undefined || row[signal] === null ? -Infinity : row[signal]));
  }
  return name === "cluster" ? data.cluster.map((one) => (one ? -one : -Infinity)) : data[name];
}

function select() {
  const labels = new Set(Array.from(form.querySelectorAll("[name=label]:checked"), (box) => box.value));
  const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const cluster = form.elements.cluster.value, least = Number(form.elements.least.value);
  const only = form.elements.only.value;
  const wanted = data.labels.map((one) => labels.has(one.code));
  const found = [];
  for (let row = 0; row < count; row++) {
    if (!wanted[data.label[row]] || data.severity[row] < least) continue;
    if (only === "near" && !near(row)) continue;
    if (["confirmed", "dismissed", "unsure"].includes(only) && review.verdicts[data.id[row]]?.verdict !== only) continue;
    if (only === "open" && review.verdicts[data.id[row]]?.verdict) continue;
    if (cluster !== "" && data.cluster[row] !== Number(cluster)) continue;
    if (words.length && !words.every((word) => searchable()[row].includes(word))) continue;
    found.push(row);
  }
  const by = form.elements.sort.value;
  if (by === "caption") {
    const collator = new Intl.Collator("en");
    found.sort((a, b) => collator.compare(data.caption[a], data.caption[b]) || a - b);
  } else {
    const values = numbers(by); // rows stand worst first, so equal values keep that order
    found.sort((a, b) => (values[b] === values[a] ? a - b : values[b] - values[a]));
  }
  state.order = found;
  state.page = 0;
  draw();
  remember();
}

// --- the address: filters, sort and page, or a prompt, so that what is looked at can be handed on as a link ----------
function place(hash) {
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function chosen() {
  const parts = new URLSearchParams(), e = form.elements;
  const labels = Array.from(form.querySelectorAll("[name=label]:checked"), (box) => box.value);
  if (labels.length < data.labels.length) parts.set("labels", labels.join("."));
  if (e.text.value.trim()) parts.set("text", e.text.value.trim());
  if (e.cluster.value) parts.set("cluster", e.cluster.value);
  if (Number(e.least.value)) parts.set("least", e.least.value);
  if (e.only.value) parts.set("only", e.only.value);
  if (e.sort.value !== "severity") parts.set("sort", e.sort.value);
  return parts;
}

function remember() {
  if (!state.ready) return;
  const parts = chosen();
  if (state.page) parts.set("page", state.page + 1);
  const names = [...parts.keys()];
  if (names.length === 1 && names[0] === "cluster" && parts.get("cluster") !== "0") place(`#cluster-${parts.get("cluster")}`);
  else if (names.length) place(`#list?${parts}`);
  else if (/^#(list|cluster-|prompt-)/.test(location.hash)) place("#flagged");
}

function restore(text) {
  const parts = new URLSearchParams(text), e = form.elements, labels = (parts.get("labels") ?? "").split(".");
  for (const box of form.querySelectorAll("[name=label]")) box.checked = !parts.has("labels") || labels.includes(box.value);
  e.text.value = parts.get("text") || "";
  for (const name of ["cluster", "least", "only", "sort"]) {
    const wanted = parts.get(name) || (name === "sort" ? "severity" : name === "least" ? "0" : "");
    if ([...e[name].options].some((one) => one.value === wanted)) e[name].value = wanted;
  }
  const page = Number(parts.get("page") || 1) - 1;
  showCluster();
  select();
  if (page > 0) go(page);
}

// --- one card --------------------------------------------------------------------------------------------------
function figure(kind, source, alt, caption) {
  const missing = data.show === "none" ? "hidden" : "not available";
  const image = source
    ? make("img", { src: source, alt, decoding: "async" })
    : make("span", { class: "missing" }, missing);
  return make("figure", { class: kind }, image, caption ? make("figcaption", {}, caption) : null);
}

function overlay(image, map) {
  const alt = "Where the model's own signals see memorisation, over the generation: light is most";
  return make("figure", { class: "photo" },
    make("span", { class: "layers" },
      image ? make("img", { src: image, alt: "The generation, under the map", decoding: "async" }) : null,
      make("img", { src: map, alt, class: "over", decoding: "async" })),
    make("figcaption", {}, "Localisation"));
}

function evidence(row) {
  const found = data.evidence[data.id[row]];
  if (!found || data.show === "none") return null;
  pictures ||= parsed("pictures");
  const own = pictures.prompts[data.id[row]] || {}, other = pictures.references[found.match_id] || {};
  const about = data.caption[row].slice(0, 120);
  const columns = [
    ["Generation", own.image, `Generation for: ${about}`],
    ["Foreground", own.foreground, "Foreground of the generation"],
    ["Background", own.background, "Background of the generation"],
    ["Similarity", own.similarity, "Map of similarity: light where both images are alike"],
    ["Best match", other.image, `Training image ${found.match_id}`],
    ["Foreground", other.foreground, "Foreground of the training image"],
    ["Background", other.background, "Background of the training image"],
  ];
  const grid = make("div", { class: "pictures" }, columns.map(([title, source, alt]) =>
    figure("photo", source, alt, title)));
  grid.append(own.localization ? overlay(own.image, own.localization) : make("span"));
  const more = found.generations.length > 1 ? ` (${found.generations.length} generations)` : "";
  return make("div", { class: "shown-evidence" }, grid,
    make("button", { type: "button", class: "enlarge", "data-row": row }, `Enlarge and compare${more}`));
}

function bar(region, value, found) {
  const threshold = data.thresholds[region], copied = found && found.copied.includes(region);
  const over = value >= threshold;
  const title = region[0].toUpperCase() + region.slice(1);
  return make("p", { class: over ? "over" : "under" }, make("span", {}, title),
    make("span", { class: "bar", "aria-hidden": "true" },
      make("i", { style: { width: `${100 * Math.min(1, Math.max(0, value))}%` } }),
      make("u", { style: { left: `${100 * threshold}%` } })),
    make("span", { class: "value" }, make("b", {}, score(value)), ` ${over ? "\u2265" : "<"} ${threshold}`,
      copied ? make("small", {}, " copied: the region has no score of its own") : null));
}

const near = (row) => data.margin[row] < data.near;
const entry = (term, ...content) => make("div", {}, make("dt", {}, term), make("dd", {}, ...content));

function reached(row, best) {
  const seen = new Map(); // near-duplicates stand together
  data.matches[row].forEach((one, place) => {
    const group = data.groups[row][place];
    seen.set(group, [...(seen.get(group) || []), one]);
  });
  const parts = [];
  for (const members of seen.values()) {
    const others = members.filter((one) => data.references[one] !== best), alike = others.length < members.length;
    if (!others.length) continue;
    if (parts.length) parts.push(", ");
    parts.push(referenceLink(others[0]));
    const more = others.length - 1;
    if (alike) parts.push(make("small", {}, ` near-duplicate of the match${more ? `, ${number(more)} more` : ""}`));
    else if (more) parts.push(make("small", {}, ` + ${plural(more, "near-duplicate", "near-duplicates")}`));
  }
  const more = data.matched[row] - data.matches[row].length;
  if (more > 0) parts.push(` and ${number(more)} more`);
  return parts;
}

function matchLine(row, best, found) {
  const place = data.references.indexOf(best);
  const line = [place >= 0 ? referenceLink(place) : isolated(best)];
  if (place >= 0 && data.urls[place]) line.push(" ", make("small", {}, isolated(data.urls[place])));
  if (found && found.match_caption) line.push(make("br"), make("q", {}, isolated(found.match_caption)));
  return line;
}

function signals(row, found) {
  const parts = [`margin ${score(data.margin[row])}`];
  if (found && found.similarity !== null) parts.push(`similarity ${score(found.similarity)}`);
  if (data.noise_norm[row] !== null) parts.push(`noise norm ${score(data.noise_norm[row])}`);
  for (const [name, value] of Object.entries((data.signals && data.signals[row]) || {}))
    if (value !== null && name !== "noise_norm") parts.push(`${name.replaceAll("_", " ")} ${Number(value.toPrecision(3))}`);
  for (const [name, value] of Object.entries((found && found.terms) || {}))
    if (value !== null) parts.push(`${name.replaceAll("_", " ")} ${Number(value.toPrecision(3))}`);
  if (data.agreement[row] !== null) parts.push(`localisation agrees ${Math.round(100 * data.agreement[row])}%`);
  if (found) parts.push(`sample ${found.sample}, seed ${found.seed}`);
  return parts.join("; ");
}

function card(row, place) {
  const id = data.id[row], found = data.evidence[id], label = data.labels[data.label[row]];
  const best = found ? found.match_id : data.references[data.matches[row][0]];
  const others = reached(row, best), pictures_ = evidence(row);
  const cluster = data.cluster[row];
  const generations = found
    ? found.labels.map((one) => make("span", { class: `tag ${one}` }, one))
    : [number(data.samples[row])];
  const words = make("div", { class: "words" },
    make("p", { class: "verdict" },
      make("span", { class: `chip ${label.code}` }, label.code), ` ${label.name} `,
      near(row) ? make("span", { class: "near" }, "near a threshold") : null,
      make("span", { class: "severity" }, "severity ", make("b", {}, score(data.severity[row]))),
      cluster ? make("a", { class: "severity", href: `#cluster-${cluster}` }, `cluster ${cluster}`) : null),
    make("h3", { id: `p${place}` }, isolated(data.caption[row])),
    found && found.caption
      ? make("details", { class: "full" }, make("summary", {}, "Full caption"), make("p", {}, isolated(found.caption)))
      : null,
    make("div", { class: `bars ${label.code}` }, bar("foreground", data.foreground[row], found), bar("background", data.background[row], found)),
    make("dl", { class: "small" },
      entry("Generations", ...generations, ` ${Math.round(1000 * data.share[row]) / 10}% memorised`),
      entry("Match", ...matchLine(row, best, found)),
      others.length ? entry("Also reaches", ...others) : null,
      entry("Signals", signals(row, found)),
      entry("Source", isolated(data.sources[data.source[row]]), `, row ${data.row[row]}`,
        data.count[row] > 1 ? `, ${number(data.count[row])} times in the input` : "", `; id ${id}`)));
  words.append(reviewBox(id));
  const item = make("li", { class: "card", tabindex: "-1", "data-row": row, "aria-labelledby": `p${place}` },
    make("article", { class: pictures_ ? null : "plain" }, pictures_, words));
  markReview(item, id);
  return item;
}

// --- a page of cards -------------------------------------------------------------------------------------------
function draw(first = state.page * PAGE, size = PAGE) {
  const rows = state.order.slice(first, first + size), pages = Math.ceil(state.order.length / PAGE);
  list.replaceChildren(...rows.map((row, place) => card(row, first + place)));
  list.start = first + 1;
  byId("shown").textContent = `${number(state.order.length)} of ${number(count)} prompts`;
  byId("empty").hidden = state.order.length > 0;
  byId("pager").hidden = count <= PAGE;
  byId("page").textContent = pages ? `Page ${number(state.page + 1)} of ${number(pages)}` : "";
  for (const button of byId("pager").querySelectorAll("button")) {
    const back = ["first", "previous"].includes(button.dataset.go);
    button.disabled = back ? state.page === 0 : state.page >= pages - 1;
  }
}

function go(page) {
  const last = Math.max(0, Math.ceil(state.order.length / PAGE) - 1);
  const next = Math.min(last, Math.max(0, page));
  if (next === state.page) return;
  state.page = next;
  draw();
  remember();
  form.scrollIntoView({ block: "start" });
  list.firstElementChild?.focus({ preventScroll: true });
}

// --- a cluster's page ------------------------------------------------------------------------------------------
const clusters = new Map(data.clusters.map((one) => [one.cluster, one]));

function showCluster() {
  const chosen = clusters.get(Number(form.elements.cluster.value)), panel = byId("cluster");
  panel.hidden = !chosen;
  if (!chosen) return;
  const reach = new Map();
  for (let row = 0; row < count; row++) {
    if (data.cluster[row] !== chosen.cluster) continue;
    for (const group of new Set(data.groups[row])) reach.set(group, (reach.get(group) || 0) + 1);
  }
  const images = [...reach].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  pictures ||= parsed("pictures");
  const tiles = images.slice(0, 12).map(([group, prompts]) => {
    const drawn = pictures.references[data.references[group]];
    return make("li", {}, drawn && drawn.image ? make("img", { src: drawn.image, alt: "", decoding: "async" }) : null,
      referenceLink(group), make("small", {}, plural(prompts, "prompt", "prompts")));
  });
  panel.replaceChildren(
    make("h3", {}, `Cluster ${chosen.cluster}: `, isolated(chosen.name)),
    make("p", {}, `${plural(chosen.prompts, "prompt", "prompts")} (${data.labels.map((one) => `${one.code} ${chosen[one.code]}`).join(", ")}), `,
      `severity ${chosen.severity} in all, ${plural(chosen.images, "training image", "training images")}. `,
      `Persistence ${score(chosen.persistence)}, stability ${score(chosen.stability)}.`),
    make("p", {}, "Telling words: ", isolated(chosen.words.join(", ") || "none"), ". In the middle: ", make("q", {}, isolated(chosen.caption))),
    make("ol", { class: "strip" }, tiles),
    images.length > 12 ? make("p", { class: "aside" }, `and ${number(images.length - 12)} more images`) : "",
    make("p", {}, make("a", { href: "#flagged" }, "All clusters")));
}

function follow() {
  const list_ = /^#list\?(.*)$/.exec(location.hash), prompt_ = /^#prompt-(\w+)$/.exec(location.hash);
  if (list_) return restore(list_[1]);
  if (prompt_) {
    const row = data.id.indexOf(prompt_[1]), at = state.order.indexOf(row);
    if (at < 0) return undefined;
    state.page = Math.floor(at / PAGE);
    draw();
    list.children[at % PAGE]?.scrollIntoView({ block: "start" });
    list.children[at % PAGE]?.focus({ preventScroll: true });
    return enlarge(row);
  }
  const wanted = /^#cluster-(\d+)$/.exec(location.hash);
  const value = wanted && clusters.has(Number(wanted[1])) ? wanted[1] : "";
  if (!wanted && location.hash !== "#flagged") return;
  if (form.elements.cluster.value === value) return;
  form.elements.cluster.value = value;
  showCluster();
  select();
  if (value) {
    byId("cluster").scrollIntoView({ block: "start" });
    byId("cluster").focus({ preventScroll: true });
  }
}

// --- events ----------------------------------------------------------------------------------------------------
form.elements.cluster.append(
  ...data.clusters.map((one) => make("option", { value: one.cluster }, `${one.cluster}  ${one.name} (${one.prompts})`)),
  make("option", { value: "0" }, "none"));
form.addEventListener("submit", (event) => event.preventDefault());
let waiting = 0;
form.elements.text.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(select, count > 5000 ? 120 : 0);
});
form.addEventListener("change", (event) => {
  const name = event.target.name;
  if (name === "blur") document.documentElement.classList.toggle("blur", event.target.checked);
  else if (name === "cluster") {
    showCluster();
    select();
  } else if (name !== "text") select();
});
const steps = { first: () => 0, previous: () => state.page - 1, next: () => state.page + 1, last: () => Infinity };
byId("pager").addEventListener("click", (event) => {
  const step = steps[event.target.dataset.go];
  if (step) go(step());
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
  const at_ = event.target.closest(".card");
  if (event.key === "/") { event.preventDefault(); form.elements.text.focus(); }
  else if (at_ && event.key === "Enter" && event.target === at_) { event.preventDefault(); enlarge(Number(at_.dataset.row)); }
  else if (at_ && VERDICT_KEYS[event.key]) setVerdict(data.id[Number(at_.dataset.row)], VERDICT_KEYS[event.key]);
  else if (event.key === "n") go(state.page + 1);
  else if (event.key === "p") go(state.page - 1);
  else if (event.key === "j" || event.key === "k") {
    const cards = [...list.children], at = cards.indexOf(document.activeElement.closest(".card"));
    const next = at < 0 ? 0 : at + (event.key === "j" ? 1 : -1);
    if (cards[next]) { cards[next].focus(); cards[next].scrollIntoView({ block: "start" }); }
  }
});
addEventListener("hashchange", follow);
list.addEventListener("click", (event) => {
  const picture = event.target.closest(".shown-evidence");
  if (picture) enlarge(Number(picture.closest(".card").dataset.row));
});
addEventListener("beforeprint", () => {
  const first = state.page * PAGE, last = Math.min(state.order.length, first + PRINTED), words = chosen();
  const filtered = [...words.entries()].filter(([name]) => name !== "sort").map(([name, value]) => `${name} ${value}`);
  const part = last - first < state.order.length ? `Printed are prompts ${number(first + 1)} to ${number(last)} of ${number(state.order.length)}` : `Printed are all ${number(state.order.length)} prompts`;
  byId("printed").textContent = [
    filtered.length ? `${part} that the filters leave of ${number(count)} (${filtered.join(", ")})` : `${part} of the list`,
    `sorted by ${form.elements.sort.value}. The whole list is in flagged/flagged.csv.`].join(", ");
  draw(first, PRINTED);
});
addEventListener("afterprint", () => draw());
// After the first paint, so that the figures above are there at once however long the list is.
requestAnimationFrame(() => setTimeout(() => {
  form.hidden = byId("reviewing").hidden = false;
  watchViewer();
  watchReview();
  select();
  follow();
  state.ready = true;
  document.documentElement.dataset.ready = "true";
}));
