// --- a person's verdicts: kept in this browser, saved as review.json, which `memscan reduce --review` takes up --------
const VERDICTS = { confirmed: "Confirm", dismissed: "Dismiss", unsure: "Unsure" };
const VERDICT_KEYS = { c: "confirmed", d: "dismissed", u: "unsure" };
const FORMAT = "memscan-review/1", KEPT = `memscan-review:${data.run}`;
const review = { reviewer: "", verdicts: {} };

function recall() {
  try { adopt(JSON.parse(localStorage.getItem(KEPT) || "{}")); } catch { /* a browser that keeps nothing */ }
}

function adopt(kept) {
  if (typeof kept.reviewer === "string") review.reviewer = kept.reviewer;
  const known = new Set(data.id);
  let taken = 0;
  for (const one of Array.isArray(kept.verdicts) ? kept.verdicts : []) {
    if (!one || !known.has(one.prompt_id) || !(one.verdict in VERDICTS || one.verdict === null)) continue;
    const before = review.verdicts[one.prompt_id];
    if (before && before.when >= String(one.when)) continue;
    review.verdicts[one.prompt_id] = { verdict: one.verdict, note: String(one.note || ""), when: String(one.when || ""), reviewer: String(one.reviewer || "") };
    taken += 1;
  }
  return taken;
}

function reviewDocument() {
  const verdicts = Object.entries(review.verdicts).map(([prompt_id, one]) => ({ prompt_id, ...one }));
  return { format: FORMAT, run: data.run, reviewer: review.reviewer, saved: new Date().toISOString(), verdicts };
}

function keep() {
  try { localStorage.setItem(KEPT, JSON.stringify(reviewDocument())); } catch { /* as above: saving to a file still works */ }
  tellReview();
}

function setVerdict(id, verdict, note) {
  const before = review.verdicts[id] || { verdict: null, note: "" };
  const next = { ...before, when: new Date().toISOString(), reviewer: review.reviewer };
  if (verdict !== undefined) next.verdict = before.verdict === verdict ? null : verdict;
  if (note !== undefined) next.note = note;
  if (next.verdict === null && !next.note) delete review.verdicts[id];
  else review.verdicts[id] = next;
  keep();
  for (const place_ of document.querySelectorAll(`[data-review="${id}"]`)) markReview(place_.closest(".card, dialog"), id);
}

function reviewBox(id) {
  return make("div", { class: "review", "data-review": id },
    make("span", { class: "hear" }, "Your verdict"),
    Object.entries(VERDICTS).map(([verdict, word]) => make("button", { type: "button", "data-verdict": verdict, "aria-pressed": "false" }, word)),
    make("label", {}, make("span", { class: "hear" }, "Note"), make("input", { type: "text", class: "remark", placeholder: "Note", maxlength: 2000, autocomplete: "off" })));
}

function markReview(within, id) {
  const box = within?.querySelector(".review");
  if (!box) return;
  box.dataset.review = id;
  const one = review.verdicts[id];
  for (const button of box.querySelectorAll("button")) button.setAttribute("aria-pressed", String(one?.verdict === button.dataset.verdict));
  const note = box.querySelector(".remark");
  if (note !== document.activeElement) note.value = one?.note || "";
  within.classList.toggle("dismissed", one?.verdict === "dismissed");
}

function tellReview() {
  const counts = { confirmed: 0, dismissed: 0, unsure: 0 };
  for (const one of Object.values(review.verdicts)) if (one.verdict) counts[one.verdict] += 1;
  const judged = counts.confirmed + counts.dismissed + counts.unsure;
  byId("reviewed").textContent = `${number(judged)} of ${number(count)} reviewed: ${counts.confirmed} confirmed, ${counts.dismissed} dismissed, ${counts.unsure} unsure`;
}

function watchReview() {
  recall();
  const reviewer = byId("reviewer");
  reviewer.value = review.reviewer;
  tellReview();
  viewer.querySelector(".verdicts").append(reviewBox(""));
  reviewer.addEventListener("change", () => { review.reviewer = reviewer.value.trim(); keep(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".review button");
    if (button) setVerdict(button.closest(".review").dataset.review, button.dataset.verdict);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches(".review .remark")) setVerdict(event.target.closest(".review").dataset.review, undefined, event.target.value.trim());
  });
  byId("save").addEventListener("click", () => {
    const file = new Blob([JSON.stringify(reviewDocument(), null, 1)], { type: "application/json" });
    const link_ = make("a", { href: URL.createObjectURL(file), download: "review.json" });
    link_.click();
    URL.revokeObjectURL(link_.href);
  });
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files, told = byId("loaded");
    if (!file) return;
    try {
      const kept = JSON.parse(await file.text());
      if (kept.format !== FORMAT) told.textContent = "This is no review.json.";
      else if (kept.run !== data.run) told.textContent = "This review is of another run.";
      else { told.textContent = `${number(adopt(kept))} verdicts taken up.`; reviewer.value = review.reviewer; keep(); select(); }
    } catch { told.textContent = "This file cannot be read as JSON."; }
    event.target.value = "";
  });
}
