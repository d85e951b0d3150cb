(() => {
  "use strict";
  const form = document.getElementById("controls");
  const list = document.getElementById("cards");
  if (!form || !list) return;
  const shown = document.getElementById("shown");
  const empty = document.getElementById("empty");
  const cards = Array.from(list.children, (element, order) => ({
    element,
    order,
    label: element.dataset.label,
    search: element.dataset.search,
    caption: element.querySelector("h3").textContent,
    severity: Number(element.dataset.severity),
    margin: Number(element.dataset.margin),
    share: Number(element.dataset.share),
    reach: Number(element.dataset.reach),
  }));
  const compare = {
    caption: (a, b) => a.caption.localeCompare(b.caption),
  };
  for (const key of ["severity", "margin", "share", "reach"]) compare[key] = (a, b) => b[key] - a[key];

  function filter() {
    const labels = new Set(Array.from(form.querySelectorAll("[name=label]:checked"), (box) => box.value));
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const show = labels.has(card.label) && words.every((word) => card.search.includes(word));
      card.element.hidden = !show;
      count += show ? 1 : 0;
    }
    shown.textContent = `${count.toLocaleString("en")} of ${cards.length.toLocaleString("en")} shown`;
    empty.hidden = count > 0;
  }

  function sort() {
    const by = compare[form.elements.sort.value];
    const sorted = [...cards].sort((a, b) => by(a, b) || a.order - b.order);
    list.append(...sorted.map((card) => card.element));
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.text.addEventListener("input", filter);
  form.addEventListener("change", (event) => {
    if (event.target.name === "sort") sort();
    else if (event.target.name === "blur") document.documentElement.classList.toggle("blur", event.target.checked);
    else filter();
  });
  form.hidden = false;
  sort();
  filter();
})();
