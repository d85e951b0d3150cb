// --- evidence enlarged: generation and match side by side, behind a slider, or in turn; masks and maps over them ------
const viewer = byId("viewer");
const view = { row: -1, sample: 0, timer: 0, from: null };
const WAYS = ["side", "slider", "blink"];

function evidences(row) {
  // Every generation that has a picture, the best evidence first, each with the training image it matches.
  const id = data.id[row], found = data.evidence[id];
  if (!found || data.show === "none") return [];
  pictures ||= parsed("pictures");
  const own = pictures.prompts[id] || {};
  // Pictures first: "foreground" and "background" are their cut-outs there, and the scores here.
  const first = { ...own, ...found.generations[0] };
  const others = found.generations.slice(1).map((one) => ({ ...((own.others || {})[one.sample] || {}), ...one }));
  return [first, ...others].map((one) => ({ ...one, match: pictures.references[one.match_id] || {} }));
}

function region(picture, mask, part) {
  const image = make("img", { src: picture, alt: "", decoding: "async" });
  if (part !== "whole" && mask) {
    image.className = "cut";
    image.style.setProperty("--mask", `url("${mask[part]}")`);
  }
  return image;
}

function side(title, one, part, overlays) {
  const source = one.full || one.image;
  const masks = one.mask ? { foreground: one.mask, background: one.hole } : null;
  const layers = make("span", { class: "layer" }, source
    ? region(source, masks, part) : make("span", { class: "missing" }, "not stored"));
  for (const [map, name] of overlays)
    if (map) layers.append(make("img", { src: map, alt: name, class: "over", decoding: "async" }));
  return make("figure", { class: title.toLowerCase().replace(" ", "-") }, layers, make("figcaption", {}, title));
}

function show() {
  const row = view.row, all = evidences(row), one = all[view.sample] || all[0];
  const tools = viewer.querySelector("form").elements;
  const way = tools.way.value, part = tools.part.value;
  const maps = [
    [tools.similarity.checked && one.similarity, "Map of similarity over the generation"],
    [tools.localization.checked && one.localization, "Map of localisation over the generation"]];
  const stage = byId("stage");
  clearInterval(view.timer);
  stage.className = way;
  stage.replaceChildren(
    side("Generation", one, part, maps),
    side("Training image", one.match, part, []));
  tools.at.closest("label").hidden = way !== "slider";
  split();
  if (way === "blink") {
    const turn = () => stage.classList.toggle("turned");
    // WCAG 2.2.2, 2.3.1: once a second, and not by itself where motion is unwanted: the space bar turns the picture.
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) view.timer = setInterval(turn, 1000);
  }
  tools.similarity.disabled = !one.similarity;
  tools.localization.disabled = !one.localization;
  byId("scale").hidden = !maps.some(([map]) => map);
  byId("viewer-title").replaceChildren(isolated(data.caption[row]));
  byId("viewer-facts").replaceChildren(
    make("span", { class: `chip ${one.label}` }, one.label), ` sample ${one.sample}, foreground ${score(one.foreground)}, `,
    `background ${score(one.background)}; training image `, isolated(one.match_id),
    one.full ? "" : " (the pictures are small ones: memscan export writes them as they are stored)");
  byId("all").replaceChildren(...all.map((each, at) => make("li", {},
    make("button", { type: "button", "data-at": at, "aria-pressed": String(at === view.sample), title: `sample ${each.sample}` },
      each.image ? make("img", { src: each.image, alt: `Generation ${each.sample}` }) : make("span", { class: "missing" }, "not stored"),
      each.match.image ? make("img", { src: each.match.image, alt: `its training image ${each.match_id}` }) : null,
      make("span", { class: `tag ${each.label}` }, each.label)))));
}

function split() {
  const tools = viewer.querySelector("form").elements;
  byId("stage").style.setProperty("--at", `${tools.at.value}%`);
}

function enlarge(row) {
  if (!evidences(row).length) return;
  view.row = row;
  view.sample = 0;
  view.from = document.activeElement;
  show();
  markReview(viewer, data.id[row]);
  if (!viewer.open) viewer.showModal();
  place(`#prompt-${data.id[row]}`);
}

function stepTo(step) {
  let at = state.order.indexOf(view.row) + step;
  while (at >= 0 && at < state.order.length && !evidences(state.order[at]).length) at += step;
  if (at >= 0 && at < state.order.length) enlarge(state.order[at]);
}

function watchViewer() {
  viewer.addEventListener("close", () => {
    clearInterval(view.timer);
    remember();
    view.from?.isConnected && view.from.focus({ preventScroll: true });
  });
  viewer.querySelector("form").addEventListener("change", show);
  viewer.querySelector("form").elements.at.addEventListener("input", split);
  viewer.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (event.target === viewer || button?.dataset.do === "close") viewer.close();
    else if (button?.dataset.do === "previous") stepTo(-1);
    else if (button?.dataset.do === "next") stepTo(1);
    else if (button?.dataset.at !== undefined) {
      view.sample = Number(button.dataset.at);
      show();
      byId("all").children[view.sample]?.firstElementChild.focus();
    }
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=text], input[type=range], textarea, select")) return;
    const tools = viewer.querySelector("form").elements, number_ = ["1", "2", "3"].indexOf(event.key);
    if (number_ >= 0) { tools.way.value = WAYS[number_]; show(); }
    else if (event.key === "s" && !tools.similarity.disabled) { tools.similarity.checked = !tools.similarity.checked; show(); }
    else if (event.key === "l" && !tools.localization.disabled) { tools.localization.checked = !tools.localization.checked; show(); }
    else if (event.key === "j" || event.key === "ArrowRight" && !event.target.matches("input")) stepTo(1);
    else if (event.key === "k" || event.key === "ArrowLeft" && !event.target.matches("input")) stepTo(-1);
    else if (event.key === " " && tools.way.value === "blink" && event.target === viewer) byId("stage").classList.toggle("turned");
    else if (VERDICT_KEYS[event.key]) setVerdict(data.id[view.row], VERDICT_KEYS[event.key]);
    else return;
    event.preventDefault();
  });
}
