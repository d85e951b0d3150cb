(() => {
  "use strict";
  const PAGE = 24, PRINTED = 100;
  const byId = (id) => document.getElementById(id);
  const form = byId("controls"), list = byId("cards");
  if (!form || !list) return;
  const parsed = (id) => JSON.parse(byId(id).textContent);
  const data = parsed("data");
  let pictures = null; // some megabytes: read when the first card is drawn
  const count = data.id.length;
  const state = { order: [], page: 0 };
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
    const wanted = data.labels.map((one) => labels.has(one.code));
    const found = [];
    for (let row = 0; row < count; row++) {
      if (!wanted[data.label[row]] || data.severity[row] < least) continue;
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
  }

  // --- one card --------------------------------------------------------------------------------------------------
  function figure(kind, source, alt, caption, cut) {
    const missing = data.show === "none" ? "hidden" : "not available";
    const image = source
      ? make("img", { src: source, alt, decoding: "async" })
      : make("span", { class: "missing" }, missing);
    if (source && cut) {
      image.className = `cut ${cut.region}`;
      image.style.setProperty("--mask", `url("${cut.mask}")`);
    }
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
    const cut = (of, region) => (of.mask ? { mask: of.mask, region } : null);
    const about = data.caption[row].slice(0, 120);
    const columns = [
      ["Generation", own.image, `Generation for: ${about}`, null],
      ["Foreground", own.mask && own.image, "Foreground of the generation", cut(own, "foreground")],
      ["Background", own.mask && own.image, "Background of the generation", cut(own, "background")],
      ["Similarity", own.similarity, "Map of similarity: light where both images are alike", null],
      ["Best match", other.image, `Training image ${found.match_id}`, null],
      ["Its foreground", other.mask && other.image, "Foreground of the training image", cut(other, "foreground")],
      ["Its background", other.mask && other.image, "Background of the training image", cut(other, "background")],
    ];
    const grid = make("div", { class: "pictures" }, columns.map(([title, source, alt, part]) =>
      figure("photo", source, alt, title, part)));
    grid.append(own.localization ? overlay(own.image, own.localization) : make("span"));
    return grid;
  }

  function bar(region, value, found) {
    const threshold = data.thresholds[region], copied = found && found.copied.includes(region);
    const over = value >= threshold;
    const title = region[0].toUpperCase() + region.slice(1);
    return make("p", { class: over ? "over" : "under" }, make("span", {}, title),
      make("span", { class: "bar", "aria-hidden": "true" },
        make("i", { style: { width: `${100 * Math.min(1, Math.max(0, value))}%` } }),
        make("u", { style: { left: `${100 * threshold}%` } })),
      make("span", { class: "value" }, make("b", {}, score(value)), ` ${over ? "at or above" : "below"} ${threshold}`,
        copied ? make("small", {}, " copied: the region has no score of its own") : null));
  }

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
    return make("li", { class: "card", tabindex: "-1", "aria-labelledby": `p${place}` },
      make("article", { class: pictures_ ? null : "plain" }, pictures_, words));
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
      const value = form.elements.cluster.value;
      history.replaceState(null, "", Number(value) ? `#cluster-${value}` : "#flagged");
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
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "/") { event.preventDefault(); form.elements.text.focus(); }
    else if (event.key === "n") go(state.page + 1);
    else if (event.key === "p") go(state.page - 1);
    else if (event.key === "j" || event.key === "k") {
      const cards = [...list.children], at = cards.indexOf(document.activeElement.closest(".card"));
      const next = at < 0 ? 0 : at + (event.key === "j" ? 1 : -1);
      if (cards[next]) { cards[next].focus(); cards[next].scrollIntoView({ block: "start" }); }
    }
  });
  addEventListener("hashchange", follow);
  addEventListener("beforeprint", () => draw(state.page * PAGE, PRINTED));
  addEventListener("afterprint", () => draw());
  // After the first paint, so that the figures above are there at once however long the list is.
  requestAnimationFrame(() => setTimeout(() => {
    form.hidden = false;
    select();
    follow();
    document.documentElement.dataset.ready = "true";
  }));
})();
