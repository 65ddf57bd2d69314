/* The tokens of a prompt, coloured by a row or a column of the head's map, and lines between them.

   One fetch a row, kept by the browser; spans are made here, not by the server: thousands of
   components would take minutes. Hover looks, a click locks, Shift looks at columns. */
(function () {
  "use strict";
  const hs = window.headscope;
  const LEVELS = 254;
  const MOST_LINES = 40;
  const MOST_LIT = 512;  // each costs the browser a style
  const LEAST_LINE = 0.02;
  let shown = null;      // what is in the panel: key of the prompt
  let info = null;
  let spans = [];
  let painted = [];
  let over = null;
  let ticket = 0;
  let placed = null;     // what the server found for the state: nothing else is asked for
  const rows = new Map();

  const $ = (id) => document.getElementById(id);
  const value = (code) => (code === 0 ? NaN : ((code - 1) / LEVELS) ** 2);
  hs.value = value;

  function base(s) {
    return `/data/${encodeURIComponent(s.run)}/${encodeURIComponent(s.prompt || hs.prompt)}`;
  }
  hs.data_base = base;
  hs.head_base = (s) => `${base(s)}/${s.tower || hs.tower || "text"}/${s.layer}/${s.head}`;

  async function load(s) {
    const tower = s.tower || hs.tower || "text";
    const key = `${base(s)}?${tower}`;
    if (shown === key) { paint(s); return; }
    shown = key;
    info = null;
    const mine = ++ticket;
    const answer = await fetch(`${base(s)}/tokens.json?tower=${encodeURIComponent(tower)}`);
    if (mine !== ticket) return;
    const panel = $("tokens");
    if (!answer.ok) { panel.textContent = await answer.text(); shown = null; return; }
    info = await answer.json();
    if (mine !== ticket) return;
    const part = document.createDocumentFragment();
    spans = info.key.map((text, i) => {
      const e = document.createElement("bdi");
      e.className = "token";
      e.dataset.i = i;
      e.textContent = text;
      part.append(e);
      return e;
    });
    painted = [];
    panel.replaceChildren(part);
    panel.classList.toggle("patches", !info.words);
    paint(hs.state);
  }

  async function fetch_row(s, kind, at) {
    const address = `${hs.head_base(s)}/${kind}/${at}`;
    if (rows.has(address)) return rows.get(address);
    const answer = await fetch(address);
    if (!answer.ok) return null;
    const codes = new Uint8Array(await answer.arrayBuffer());
    if (rows.size > 400) rows.delete(rows.keys().next().value);
    rows.set(address, codes);
    return codes;
  }
  hs.fetch_row = fetch_row;

  /* Which row is looked at: the one under the pointer, else the locked one, else the last. */
  function looked(s) {
    if (over) return over;
    const lock = /^([rc])(\d+)$/.exec(s.lock || "");
    if (lock && info && Number(lock[2]) < info.key.length) return {kind: lock[1] === "c" ? "column" : "row", at: Number(lock[2])};
    return {kind: "row", at: info.key.length - 1};
  }

  async function paint(s) {
    if (!info || s.layer === undefined || !spans.length) return;
    const {kind, at} = looked(s);
    // Rows count queries, of which there may be fewer than keys.
    const place = kind === "row" ? (info.query ? Math.min(at, info.query.length - 1) : Math.max(0, at - info.shift)) : at;
    const mine = `${kind}${at}`;
    paint.wanted = mine;
    const codes = await fetch_row(s, kind, place);
    if (!codes || paint.wanted !== mine) return;
    const hide = s.hide === "1" && kind === "row";
    const shift = kind === "column" && !info.query ? info.shift : 0;
    let most = 0;
    for (let i = hide ? 1 : 0; i < codes.length; i++) if (codes[i] > most) most = codes[i];
    const lit = [];
    for (let i = 0; i < codes.length; i++) {
      const e = spans[i + shift];
      if (!e) continue;
      const v = hide && i === 0 ? 0 : value(codes[i]);
      const level = most > 1 && v > 0 ? Math.sqrt(v / value(most)) : 0;
      if (level > 0.04) lit.push([i + shift, level, v]);
    }
    lit.sort((a, b) => b[2] - a[2]);
    lit.length = Math.min(lit.length, MOST_LIT);
    painted.forEach((i) => { if (spans[i]) { spans[i].style.removeProperty("--w"); spans[i].classList.remove("at"); } });
    painted = lit.map(([i]) => i);
    lit.forEach(([i, level]) => spans[i].style.setProperty("--w", level.toFixed(3)));
    if (spans[at]) { spans[at].classList.add("at"); painted.push(at); }
    const total = codes.reduce((sum, c, i) => sum + (c && !(hide && i === 0) ? value(c) : 0), 0);
    const scale = hide && total > 0 ? 1 / total : 1;
    tell(kind, at, lit.slice(0, 5).map(([i, , v]) => [i, v * scale]), hide);
    draw(at, lit.slice(0, MOST_LINES).filter(([, , v]) => v >= LEAST_LINE), kind);
    const event = new CustomEvent("headscope-row", {detail: {kind, at: place, codes}});
    document.dispatchEvent(event);
  }

  function tell(kind, at, top, hide) {
    const out = $("token-facts");
    if (!out) return;
    const verb = kind === "row" ? "looks at" : "is looked at by";
    const words = top.map(([i, v]) => `${info.key[i]} (${i}): ${v.toFixed(3)}`).join("   ");
    out.textContent = `${info.key[at]} (${at}) ${verb}  ${words || "nothing above 0.002"}${hide ? "   [first key hidden]" : ""}`;
  }

  /* Lines from the token looked at to those it looks at, over the panel. */
  function draw(at, lit, kind) {
    const canvas = $("lines");
    const panel = $("tokens");
    if (!canvas || !panel || !spans[at]) return;
    const box = panel.getBoundingClientRect();
    canvas.width = panel.clientWidth;
    canvas.height = panel.clientHeight;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (hs.state.lines === "0") return;
    const style = getComputedStyle(document.documentElement);
    pen.strokeStyle = style.getPropertyValue(kind === "row" ? "--line-key" : "--line-query");
    const middle = (e) => {
      const r = e.getBoundingClientRect();
      return [r.left - box.left + r.width / 2, r.top - box.top + r.height / 2];
    };
    const [x0, y0] = middle(spans[at]);
    for (const [i, level] of lit) {
      if (i === at) continue;
      const [x, y] = middle(spans[i]);
      if (y < -20 || y > canvas.height + 20) continue;
      pen.globalAlpha = Math.max(0.15, level);
      pen.lineWidth = 0.5 + 2.5 * level;
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.quadraticCurveTo((x0 + x) / 2, Math.min(y0, y) - 18, x, y);
      pen.stroke();
    }
  }

  /* ---- pointer and keys ---- */

  let waiting = false;
  function point(event) {
    const e = event.target.closest && event.target.closest("#tokens .token");
    if (!e) return;
    over = {kind: event.shiftKey ? "column" : "row", at: Number(e.dataset.i)};
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(hs.state); });
  }
  document.addEventListener("pointerover", point);
  document.addEventListener("pointerout", (event) => {
    if (over && event.target.closest && event.target.closest("#tokens") &&
        !(event.relatedTarget && event.relatedTarget.closest && event.relatedTarget.closest("#tokens"))) {
      over = null;
      paint(hs.state);
    }
  });
  document.addEventListener("click", (event) => {
    const e = event.target.closest && event.target.closest("#tokens .token");
    if (!e) return;
    const lock = `${event.shiftKey ? "c" : "r"}${e.dataset.i}`;
    hs.select({lock: hs.state.lock === lock ? "" : lock});
  });
  document.addEventListener("scroll", (event) => {
    if (event.target && event.target.id === "tokens") paint(hs.state);
  }, true);

  function move(by, event) {
    if (!info || document.activeElement !== $("tokens")) return false;
    const {kind, at} = looked(hs.state);
    const next = Math.max(0, Math.min(info.key.length - 1, at + by));
    over = null;
    hs.select({lock: `${(event.shiftKey ? "column" : kind) === "column" ? "c" : "r"}${next}`});
    if (spans[next]) spans[next].scrollIntoView({block: "nearest"});
    window.setTimeout(() => hs.say($("token-facts").textContent), 120);
    return true;
  }
  hs.key("ArrowRight", "head", (e) => move(1, e));
  hs.key("ArrowLeft", "head", (e) => move(-1, e));
  hs.key("Escape", "head", () => { over = null; hs.select({lock: ""}); });
  hs.key("s", "head", () => hs.select({hide: hs.state.hide === "1" ? "" : "1"}));
  hs.key("z", "head", () => hs.select({q: "", k: ""}));

  Object.assign(window.dash_clientside.headscope, {
    head_before() { press("["); return window.dash_clientside.no_update; },
    head_after() { press("]"); return window.dash_clientside.no_update; },
    head_toss() { press("b"); return window.dash_clientside.no_update; },
    zoom_out() { press("z"); return window.dash_clientside.no_update; },
  });
  function press(key) {
    document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  }

  hs.listen((s, page) => {
    if (page !== "head" || s.layer === undefined || !placed || s.run !== placed.run) return;
    const same = ["prompt", "tower", "layer", "head"].every((n) => (s[n] || placed[n]) === placed[n]);
    if (same) load(s);
  });
  /* The server says which prompt and tower stand for those not named. */
  window.dash_clientside.headscope.place = (data) => {
    if (data) {
      placed = data.prompt ? data : null;
      hs.prompt = data.prompt;
      hs.tower = data.tower;
      if (placed) load(hs.state);
      else { shown = null; info = null; $("tokens").replaceChildren(); $("token-facts").textContent = ""; }
    }
    return window.dash_clientside.no_update;
  };
})();
