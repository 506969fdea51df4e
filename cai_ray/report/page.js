// Filters of the transcripts. Without scripts every entry is shown, and the page lacks nothing else.
(() => {
  const form = document.querySelector(".filters");
  if (!form) return;
  const entries = [...document.querySelectorAll(".entry")];
  const more = document.querySelector(".more");
  const output = form.querySelector("output");
  const texts = new Map();
  const page = 30;
  let shown = page;

  const text = (entry) => {
    if (!texts.has(entry)) texts.set(entry, entry.textContent.toLowerCase());
    return texts.get(entry);
  };
  const fits = (entry) => {
    for (const { name, value } of form.querySelectorAll("select")) {
      if (value && !entry.dataset[name].split(name === "principle" ? " " : "\n").includes(value)) return false;
    }
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    return words.every((word) => text(entry).includes(word));
  };
  const show = () => {
    let count = 0;
    for (const entry of entries) {
      const found = fits(entry);
      entry.hidden = !found || count >= shown;
      count += found;
    }
    more.hidden = count <= shown;
    output.textContent = `${count} of ${entries.length}`;
  };
  const visible = () => entries.filter((entry) => !entry.hidden).map((entry) => entry.querySelector("summary"));

  form.addEventListener("input", () => { shown = page; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { shown += page; show(); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-show]");
    if (!link) return;
    form.reset();
    form.elements.principle.value = link.dataset.show;
    shown = page;
    show();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape" && typing) { form.reset(); show(); event.target.blur(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); form.elements.text.focus(); return; }
    if (event.key !== "j" && event.key !== "k") return;
    const heads = visible();
    const place = heads.indexOf(document.activeElement);
    const next = event.key === "j" ? place + 1 : Math.max(place - 1, 0);
    if (!heads.length || next >= heads.length) return;
    heads.forEach((head, i) => { head.parentElement.open = i === next; });
    heads[next].focus();
    heads[next].scrollIntoView({ block: "start" });
  });
  form.hidden = false;
  show();
})();
