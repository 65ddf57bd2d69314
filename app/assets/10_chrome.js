/* Around the pages: keyboard, dialogs, basket, copies, theme, news of jobs. */
(function () {
  "use strict";
  const hs = window.headscope;
  const $ = (id) => document.getElementById(id);

  function make(tag, attributes, ...children) {
    const e = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes || {})) {
      if (k === "class") e.className = v;
      else if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
      else if (v !== null && v !== false) e.setAttribute(k, v === true ? "" : v);
    }
    children.forEach((c) => e.append(c));
    return e;
  }
  hs.make = make;

  /* ---- dialogs ---- */

  function open(id) {
    const dialog = $(id);
    if (dialog && !dialog.open) dialog.showModal();
  }
  document.addEventListener("click", (event) => {
    const t = event.target.closest && event.target.closest("button, [data-close]");
    if (!t) return;
    if (t.dataset.close) $(t.dataset.close).close();
    else if (t.id === "help-open") open("shortcuts");
    else if (t.id === "copy-open") { $("copy-text").textContent = ""; open("copies"); }
    else if (t.id === "theme-toggle") theme();
    else if (t.id === "copy-link") copied(window.location.href);
    else if (t.id === "copy-python") source("python");
    else if (t.id === "copy-command") source("command");
    else if (t.id === "figures-png") figures("png");
    else if (t.id === "figures-svg") figures("svg");
  });

  /* Every figure of the page as a file; on the ground of the theme, not on none. */
  async function figures(format) {
    const plots = document.querySelectorAll("section:not([hidden]) .js-plotly-plot");
    const ground = getComputedStyle(document.documentElement).getPropertyValue("--ground");
    let saved = 0;
    for (const plot of plots) {
      const of = plot.parentElement.id || plot.closest("[id]").id;
      if (!plot.clientWidth || !plot.data || !plot.data.length) continue;
      const figure = {data: plot.data, layout: {...plot.layout, paper_bgcolor: ground}};
      await window.Plotly.downloadImage(figure, {
        format, width: plot.clientWidth, height: plot.clientHeight, scale: format === "png" ? 2 : 1,
        filename: [hs.state.run, hs.head_id() && hs.state.page === "head" ? hs.head_id() : "", of].filter(Boolean).join("-"),
      });
      saved += 1;
    }
    $("copy-text").textContent = saved ? `${saved} figures saved` : "no figure is shown";
  }

  async function source(kind) {
    const query = new URLSearchParams(hs.state).toString();
    const answer = await fetch(`/copy/${kind}?${query}`);
    copied(await answer.text(), !answer.ok);
  }

  async function copied(text, failed) {
    $("copy-text").textContent = text;
    if (failed) return;
    try {
      await navigator.clipboard.writeText(text);
      hs.say("copied");
    } catch {
      // No permission: the text is there to be marked by hand.
      const range = document.createRange();
      range.selectNodeContents($("copy-text"));
      window.getSelection().removeAllRanges();
      window.getSelection().addRange(range);
    }
  }

  function theme() {
    const dark = document.documentElement.dataset.theme === "dark";
    hs.select({theme: dark ? "light" : "dark"});
    hs.say(dark ? "light" : "dark");
  }

  /* ---- jump ---- */

  function jump(text) {
    const wanted = text.trim();
    if (!wanted) return;
    if (hs.open_head(wanted)) return;
    const low = wanted.toLowerCase();
    const page = Object.entries(hs.config.pages).find(([n, p]) => n === low || p.title.toLowerCase() === low);
    if (page) { hs.select({page: page[0]}, {push: true}); return; }
    const options = hs.runs || [];
    const run = options.find((n) => n.toLowerCase().includes(low));
    if (run) { hs.select({run, page: "heads"}, {push: true}); return; }
    hs.toast(`nothing is called ${wanted}: a head is L12H7 or 12.7, else a page or a part of a run's name`);
  }

  /* ---- keyboard ---- */

  const keys = new Map();
  /* A page's own key: called while the page is shown and no field is being written in. */
  hs.key = (key, page, action) => keys.set(`${page}:${key}`, action);

  function writing(target) {
    return target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) ||
      (target.closest && target.closest(".ag-root, [role=listbox], [role=slider]"));
  }

  document.addEventListener("keydown", (event) => {
    if (!hs.config) return;
    const target = event.target;
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
      event.preventDefault(); $("jump").focus(); return;
    }
    if ((event.ctrlKey || event.metaKey) && event.key === "/") {
      event.preventDefault(); open("shortcuts"); return;
    }
    if (event.altKey && event.key.toLowerCase() === "m") { event.preventDefault(); theme(); return; }
    if (target.id === "jump") {
      if (event.key === "Enter") { const text = target.value; target.blur(); window.dash_clientside.set_props("jump", {value: ""}); jump(text); }
      if (event.key === "Escape") target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || writing(target)) return;
    if (document.querySelector("dialog[open]")) return;
    const action = keys.get(`${hs.state.page}:${event.key}`) || keys.get(`*:${event.key}`);
    if (action) { if (action(event) !== false) event.preventDefault(); }
  });

  const order = () => (hs.order || []).map((entry) => entry[0]);
  function step(by) {
    const listed = order();
    if (!listed.length) return false;
    const at = listed.indexOf(hs.head_id());
    const next = at < 0 ? 0 : Math.min(listed.length - 1, Math.max(0, at + by));
    const parts = hs.head_parts(listed[next]);
    hs.select({layer: parts.layer, head: parts.head, tower: parts.tower});
    hs.say(described(listed[next]));
    return true;
  }
  function described(id) {
    const listed = hs.order || [];
    const at = listed.findIndex((entry) => entry[0] === id);
    const parts = hs.head_parts(id);
    const where = `Layer ${parts.layer} head ${parts.head}`;
    if (at < 0) return `${where}, no score`;
    const value = listed[at][1] === null ? "no score" : `${hs.state.metric || "score"} ${listed[at][1].toPrecision(3)}`;
    return `${where}, ${value}, rank ${at + 1} of ${listed.length}`;
  }
  hs.described = described;
  hs.key("[", "*", () => step(-1));
  hs.key("]", "*", () => step(1));
  hs.key("/", "*", () => $("jump").focus());
  hs.key("?", "*", () => open("shortcuts"));
  hs.key("b", "*", () => { const id = hs.head_id(); if (id) hs.toss(id); });
  hs.key("x", "*", () => { if (hs.basket().length) hs.select({page: "intervene"}, {push: true}); });
  hs.key("m", "*", () => {
    const names = hs.metrics || [];
    if (names.length < 2) return;
    const at = Math.max(0, names.indexOf(hs.state.metric || names[0]));
    const metric = names[(at + 1) % names.length];
    hs.select({metric});
    hs.say(metric);
  });

  /* ---- basket ---- */

  hs.listen((state) => {
    const bar = $("basket");
    if (!bar) return;
    const held = hs.basket();
    bar.hidden = !held.length;
    bar.replaceChildren(
      make("span", {}, `basket: ${held.length} head${held.length === 1 ? "" : "s"}`),
      ...held.slice(0, 60).map((h) => make("span", {class: "chip"},
        make("button", {class: "plain", onclick: () => hs.open_head(h), "aria-label": `open ${h}`}, h),
        make("button", {class: "plain", onclick: () => hs.toss(h), "aria-label": `take ${h} out`}, "×"))),
      make("button", {class: "plain", onclick: () => hs.select({page: "intervene"}, {push: true})}, "intervene"),
      make("button", {class: "plain", onclick: () => hs.select({basket: ""})}, "empty"),
    );
  });

  /* ---- toasts ---- */

  hs.toast = (text, link, words) => {
    const box = make("div", {class: "toast", role: "status"}, make("span", {}, text));
    if (link) box.append(" ", make("a", {href: link}, words || "open"));
    box.append(make("button", {class: "plain", "aria-label": "dismiss", onclick: () => box.remove()}, "×"));
    $("toasts").append(box);
    window.setTimeout(() => box.remove(), 12000);
  };

  /* What callbacks want to tell the scripts: small values in stores. */
  Object.assign(window.dash_clientside.headscope, {
    order(rows) { hs.order = (rows || []).map((r) => [r.head, r.score === undefined ? null : r.score]); return window.dash_clientside.no_update; },
    metrics(data) { hs.metrics = (data || []).map((d) => d.value || d); return window.dash_clientside.no_update; },
    runs(data) { hs.runs = (data || []).map((d) => d.value || d); return window.dash_clientside.no_update; },
  });
})();
