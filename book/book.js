// Search, copy buttons, the list of chapters on a phone, and where on the page a reader is.
(() => {
  const root = document.body.dataset.root;
  const get = (id) => document.getElementById(id);

  // ---- chapters, on narrow windows
  const menu = get("menu");
  menu.addEventListener("click", () => {
    const open = document.body.classList.toggle("menu-open");
    menu.setAttribute("aria-expanded", open);
  });
  const here = document.querySelector("#chapters [aria-current]");
  if (here) {
    const list = get("chapters");
    list.scrollTop = here.offsetTop - list.clientHeight / 3;
  }

  // ---- copy buttons
  document.querySelectorAll("div.sourceCode").forEach((box) => {
    const button = document.createElement("button");
    button.className = "copy";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(box.querySelector("code").textContent);
      button.textContent = "copied";
      setTimeout(() => (button.textContent = "copy"), 1200);
    });
    box.append(button);
  });

  // ---- where on the page: the heading that was passed last
  const entries = [...document.querySelectorAll("#contents a")];
  const heads = entries.map((a) => get(decodeURIComponent(a.hash.slice(1))));
  const mark = () => {
    let at = 0;
    heads.forEach((head, i) => {
      if (head && head.getBoundingClientRect().top < 120) at = i;
    });
    entries.forEach((a, i) => a.classList.toggle("here", i === at));
    document.querySelectorAll("#contents li").forEach((li) => {
      li.classList.toggle("open", li.contains(entries[at]));
    });
  };
  if (entries.length) {
    addEventListener("scroll", mark, { passive: true });
    mark();
  }

  // ---- an address that points into a fold opens it
  const unfold = () => {
    const goal = location.hash && get(decodeURIComponent(location.hash.slice(1)));
    for (let box = goal; box; box = box.parentElement) {
      if (box.tagName === "DETAILS") box.open = true;
    }
  };
  addEventListener("hashchange", unfold);
  unfold();

  // ---- search: the index is a script, so that it can be read from a disk
  const query = get("query");
  const results = get("results");
  let asked = false;
  const load = () => {
    if (asked) return;
    asked = true;
    const script = document.createElement("script");
    script.src = root + "search-index.js";
    script.onload = show;
    document.head.append(script);
  };
  const plain = (text) => text.toLowerCase();
  const count = (text, word) => text.split(word).length - 1;

  // all words must stand in a section or its titles; titles count most
  const find = (words) => {
    const found = [];
    for (const [page, anchor, heading, text] of bookIndex.places) {
      const title = plain(bookIndex.pages[page][1]);
      const head = plain(heading);
      const body = plain(text);
      let score = 0;
      for (const word of words) {
        const times = Math.min(count(body, word), 5);
        const worth = times + 12 * head.includes(word) + 6 * title.includes(word);
        if (!worth) score = -Infinity;
        score += worth;
      }
      if (score > 0) found.push({ page, anchor, heading, text, score: score + (anchor ? 0 : 2) });
    }
    return found.sort((a, b) => b.score - a.score).slice(0, 14);
  };
  const part = (text, word) => {
    const at = Math.max(plain(text).indexOf(word), 0);
    const from = Math.max(at - 50, 0);
    return (from ? "… " : "") + text.slice(from, at + 90) + (text.length > at + 90 ? " …" : "");
  };
  const show = () => {
    const words = plain(query.value).split(/\s+/).filter((w) => w.length > 1);
    results.replaceChildren();
    results.hidden = !words.length;
    if (!words.length || !window.bookIndex) return;
    for (const hit of find(words)) {
      const [address, title] = bookIndex.pages[hit.page];
      const a = document.createElement("a");
      a.href = root + address + (hit.anchor ? "#" + hit.anchor : "");
      const head = document.createElement("strong");
      head.textContent = hit.anchor ? `${title}: ${hit.heading}` : title;
      const text = document.createElement("span");
      text.textContent = part(hit.text, words[0]);
      a.append(head, text);
      results.append(a);
    }
    if (!results.children.length) results.textContent = "Nothing found.";
  };
  query.addEventListener("focus", load);
  query.addEventListener("input", () => (load(), show()));
  query.addEventListener("keydown", (e) => {
    const first = results.querySelector("a");
    if (e.key === "Enter" && first) location.href = first.href;
    if (e.key === "Escape") ((query.value = ""), show());
  });
  document.addEventListener("click", (e) => {
    if (!e.target.closest(".search")) results.hidden = true;
  });
  document.addEventListener("keydown", (e) => {
    const typing = /INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName);
    if (e.key === "/" && !typing) (e.preventDefault(), query.focus());
  });
})();
