/* Heads on images: overlays on canvases over the pictures, patches chosen on them, who reads these.

   Which pixels a position stands for comes with the trace: any grid, tiles, frames. A fetch brings
   one byte a patch, on a scale of the row's own largest; the picture is drawn here. */
(function () {
  "use strict";
  const hs = window.headscope;
  const make = (...a) => hs.make(...a);
  const $ = (id) => document.getElementById(id);
  const LEVELS = 254;
  const RASTER = 512;      // cells of the longer side of an image that patches are summed on
  const THUMB = 128;
  const STOPS = ["440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e",
    "21918c", "1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725"];
  const VIRIDIS = Array.from({length: 256}, (_, i) => {
    const at = (i / 255) * (STOPS.length - 1);
    const low = Math.min(STOPS.length - 2, Math.floor(at));
    const part = (s, c) => parseInt(s.slice(2 * c, 2 * c + 2), 16);
    return [0, 1, 2].map((c) => Math.round(part(STOPS[low], c) + (at - low) * (part(STOPS[low + 1], c) - part(STOPS[low], c))));
  });

  let view = null;     // what the server says stands for what is not named
  let geo = null;      // patches of the tower
  let info = null;     // tokens
  let loaded = null;
  let built = null;
  let frames = [];     // per image: {image, box, canvas, picture}
  let main = null;     // {codes, most, mass, head, query} of the large overlay
  let small = null;
  let cursor = -1;     // patch under the pointer or the keyboard
  let drag = null;
  let lit = new Map(); // token to how much it reads of the chosen patches
  let marks = [];
  let ticket = 0;
  let shown_opacity = null;
  const answers = new Map();

  /* ---- what is looked at ---- */

  const base = () => `/data/${encodeURIComponent(view.run)}/${encodeURIComponent(view.prompt)}/${encodeURIComponent(view.tower)}`;
  const prefix = () => (view.tower === "text" ? "" : `${view.tower}.`);

  const own_head = (s) => s.layer !== undefined && (s.tower || view.tower) === view.tower && Number(s.head) < (view.layers[s.layer] || 0);

  function head(s) {
    return own_head(s) ? `${prefix()}L${s.layer}H${s.head}` : view.heads.length ? view.heads[0][0] : null;
  }

  const n_query = () => (info.query ? info.query.length : info.key.length - info.shift);

  /* The query as the routes count it, or "all". */
  function query(s) {
    if (s.lock === "all") return "all";
    const lock = /^r(\d+)$/.exec(s.lock || "");
    const at = lock ? Number(lock[1]) - geo.shift : -1;
    if (at >= 0 && at < n_query()) return at;
    return geo.own === null ? "all" : geo.own;
  }

  const label = (at) => (info.query ? info.query[at] : info.key[at + geo.shift]);
  const query_words = (q) => (q === "all" ? "mean of all queries" : `${label(q)} (${q + geo.shift})`);

  async function get(address, read) {
    if (answers.has(address)) return answers.get(address);
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(await answer.text());
    const made = await read(answer);
    if (answers.size > 200) answers.delete(answers.keys().next().value);
    answers.set(address, made);
    return made;
  }

  async function sights(heads, q) {
    const list = heads.map(encodeURIComponent).join(",");
    return get(`${base()}/sights/${q}?heads=${list}`, async (answer) => {
      const codes = new Uint8Array(await answer.arrayBuffer());
      const n = geo.at.length;
      return answer.headers.get("X-Sights").split(" ").map((text, i) => {
        const [most, mass] = text.split(":").map(Number);
        return {codes: codes.subarray(i * n, (i + 1) * n), most, mass};
      });
    });
  }

  /* ---- chosen patches: positions as ranges with both ends ---- */

  function chosen(s) {
    const out = new Set();
    for (const part of (s.patches || "").split(",")) {
      const match = /^(\d+)(?:-(\d+))?$/.exec(part);
      if (!match) continue;
      for (let p = Number(match[1]); p <= Math.min(Number(match[2] || match[1]), Number(match[1]) + 16384); p++) out.add(p);
    }
    return out;
  }

  function ranges(set) {
    const list = [...set].sort((a, b) => a - b);
    const out = [];
    list.forEach((p) => {
      const last = out[out.length - 1];
      if (last && last[1] === p - 1) last[1] = p; else out.push([p, p]);
    });
    return out.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
  }

  function choose(set) {
    const text = ranges(set);
    if (text.length > 1900) { hs.toast("too many separate patches for an address: drag one box"); return; }
    hs.select({patches: text});
    hs.say(set.size ? `${set.size} ${set.size === 1 ? "patch" : "patches"} chosen` : "no patch chosen");
  }

  /* ---- loading ---- */

  async function load(s) {
    const key = base();
    if (loaded !== key) {
      const mine = ++ticket;
      try {
        const [g, i] = await Promise.all([
          get(`${base()}/patches.json`, (a) => a.json()),
          get(`/data/${encodeURIComponent(view.run)}/${encodeURIComponent(view.prompt)}/tokens.json?tower=${encodeURIComponent(view.tower)}`, (a) => a.json()),
        ]);
        if (mine !== ticket) return;
        geo = g; info = i; loaded = key; cursor = -1; main = null; small = null; lit = new Map();
        build();
      } catch (error) { tell_error(error); return; }
    }
    update(hs.state);
  }

  function tell_error(error) {
    const note = $("vision-facts");
    if (note) note.replaceChildren(make("p", {class: "alert", role: "alert"}, error.message));
  }

  async function update(s) {
    if (!geo || loaded !== base()) return;
    tools(s);
    strip(s);
    const name = head(s);
    if (!name) return;
    if (!own_head(s)) { hs.select(place_of(name)); return; }
    const q = query(s);
    const mine = `${name} ${q} ${loaded}`;
    update.wanted = mine;
    const positions = ranges(new Set([...chosen(s)].filter((p) => geo.index.has(p))));
    try {
      const [one] = await sights([name], q);
      if (update.wanted !== mine) return;
      main = {...one, head: name, query: q};
      facts(); paint();
      const names = view.heads.map((h) => h[0]);
      if (names.length) {
        const all = await sights(names, q);
        if (update.wanted !== mine) return;
        small = all; thumbnails(s);
      }
      await reverse(s, name, q, positions, mine);
    } catch (error) { tell_error(error); }
  }

  /* ---- the page's own elements: made once for a prompt and a tower ---- */

  function build() {
    const key = loaded;
    if (built === key) return;
    built = key;
    geo.index = new Map(geo.at.map((p, i) => [p, i]));
    geo.frames = geo.images.map((_, j) => 1 + Math.max(0, ...geo.frame.filter((_f, i) => geo.image[i] === j)));
    const data = `/data/${encodeURIComponent(view.run)}/${encodeURIComponent(view.prompt)}`;
    frames = geo.images.map((image, j) => {
      const [w, h] = image.size;
      const picture = make("img", {alt: `image ${j + 1} of ${geo.id}, ${w} × ${h} pixels`, draggable: "false"});
      picture.addEventListener("load", () => { paint(); thumbnails(hs.state); });
      if (image.picture) picture.src = `${data}/image/${j}.png`;
      else picture.hidden = true;
      const canvas = make("canvas", {role: "img", "aria-label": `where the head looks on image ${j + 1}`});
      const box = make("div", {
        class: "vision-frame", tabindex: "0", role: "application",
        "aria-label": `patches of image ${j + 1}: arrow keys move, Space chooses, Escape clears`,
        "aria-describedby": "vision-spot",
      }, picture, canvas);
      const one = {j, w, h, box, canvas, picture};
      wire(one);
      return one;
    });
    const captions = frames.map((f) => make("figure", {}, f.box,
      make("figcaption", {class: "faint"}, frames.length > 1 ? `image ${f.j + 1}, ${f.w} × ${f.h}` : `${f.w} × ${f.h} pixels`)));
    $("vision-images").replaceChildren(...captions);
    controls();
    built_strip = null;
  }

  function check(name, state, on, title) {
    const box = make("input", {type: "checkbox", id: `vision-${name}`});
    box.addEventListener("change", () => hs.select({[state]: (box.checked === on) ? "1" : ""}));
    return make("label", {title}, box, ` ${name}`);
  }

  function controls() {
    const opacity = make("input", {type: "range", min: "0", max: "100", step: "1", id: "vision-opacity"});
    opacity.addEventListener("input", () => { shown_opacity = Number(opacity.value); paint(); });
    opacity.addEventListener("change", () => { shown_opacity = null; hs.select({opacity: opacity.value === "60" ? "" : opacity.value}); });
    const parts = [
      make("label", {}, "opacity ", opacity),
      check("pixelated", "smooth", false, "whole patches, or colours blended between them"),
      check("contour", "contour", true, "around the fewest patches that hold half of the mass on the images"),
      check("boxes", "noboxes", false, "named boxes of the prompt"),
    ];
    const most = Math.max(...geo.frames);
    if (most > 1) {
      const frame = make("input", {type: "range", min: "0", max: String(most - 1), step: "1", id: "vision-frame"});
      frame.addEventListener("input", () => hs.select({frame: frame.value === "0" ? "" : frame.value}));
      parts.push(make("label", {}, "frame ", frame, " ", make("output", {id: "vision-frame-is", for: "vision-frame"})));
    }
    parts.push(make("button", {class: "plain", id: "vision-clear", onclick: () => choose(new Set())}, "clear patches"));
    $("vision-tools").replaceChildren(...parts);
    const every = make("input", {type: "checkbox", id: "vision-every"});
    every.addEventListener("change", () => hs.select({every: every.checked ? "1" : ""}));
    $("vision-strip-tools").replaceChildren(make("label", {}, every, " all positions, patches too"));
  }

  function tools(s) {
    $("vision-opacity").value = s.opacity || "60";
    $("vision-pixelated").checked = s.smooth !== "1";
    $("vision-contour").checked = s.contour === "1";
    $("vision-boxes").checked = s.noboxes !== "1";
    $("vision-every").checked = s.every === "1";
    $("vision-clear").disabled = !s.patches;
    if ($("vision-frame")) { $("vision-frame").value = s.frame || "0"; $("vision-frame-is").textContent = s.frame || "0"; }
  }

  /* ---- tokens that look ---- */

  let built_strip = null;
  let chips = new Map();

  function listed(s) {
    const all = Array.from({length: n_query()}, (_, i) => i);
    if (s.every === "1" || info.query) return all;
    const own = all.filter((i) => !geo.index.has(i + geo.shift));
    const after = own.filter((i) => i + geo.shift > geo.at[0]);
    return info.words && after.length ? after : own;
  }

  function strip(s) {
    const key = `${loaded} ${s.every || ""}`;
    const panel = $("vision-tokens");
    if (built_strip !== key) {
      built_strip = key;
      const generated = (info.spans.generated || []).map(([a, b]) => [a - geo.shift, b - geo.shift]);
      const part = document.createDocumentFragment();
      chips = new Map();
      ["all", ...listed(s)].forEach((i) => {
        const e = document.createElement("bdi");
        e.id = `vision-token-${i}`;
        e.className = i === "all" ? "token vision-mean" : "token";
        if (i !== "all" && generated.some(([a, b]) => i >= a && i < b)) { e.classList.add("vision-made"); e.title = `position ${i + geo.shift}, generated`; }
        e.setAttribute("role", "radio");
        e.dataset.i = i;
        e.textContent = i === "all" ? "mean of all" : label(i);
        if (i !== "all" && !e.title) e.title = `position ${i + geo.shift}`;
        chips.set(String(i), e);
        part.append(e);
      });
      panel.replaceChildren(part);
      panel.classList.toggle("patches", !info.words);
      marks = [];
    }
    const q = String(query(s));
    if (!chips.has(q) && q !== "all" && s.every !== "1") {
      const e = make("bdi", {class: "token", role: "radio", "data-i": q, id: `vision-token-${q}`}, label(Number(q)));
      chips.set(q, e);
      panel.append(e);
    }
    chips.forEach((e, i) => {
      const on = i === q;
      if (e.classList.contains("at") !== on) e.classList.toggle("at", on);
      e.setAttribute("aria-checked", String(on));
    });
    panel.setAttribute("aria-activedescendant", `vision-token-${q}`);
    marks.forEach((e) => e.style.removeProperty("--w"));
    marks = [];
    const top = Math.max(0, ...lit.values());
    lit.forEach((m, i) => {
      const e = chips.get(String(i - geo.shift));
      if (e && top > 0) { e.style.setProperty("--w", Math.sqrt(m / top).toFixed(3)); marks.push(e); }
    });
  }

  function lock(i) {
    hs.select({lock: i === "all" ? "all" : `r${Number(i) + geo.shift}`});
  }
  document.addEventListener("click", (event) => {
    const e = event.target.closest && event.target.closest("#vision-tokens .token");
    if (e) lock(e.dataset.i);
  });
  document.addEventListener("keydown", (event) => {
    const panel = $("vision-tokens");
    if (!panel || document.activeElement !== panel || !geo || event.ctrlKey || event.altKey || event.metaKey) return;
    const order = [...chips.keys()];
    const at = order.indexOf(String(query(hs.state)));
    const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? order.length - 1 : by ? at + by : -1;
    if (to < 0 || to >= order.length) return;
    event.preventDefault();
    lock(order[to]);
    chips.get(order[to]).scrollIntoView({block: "nearest"});
    hs.say(query_words(query(hs.state)));
  });

  /* ---- drawing ---- */

  const visible = (i, j, frame) => geo.image[i] === j && geo.frame[i] === Math.min(frame, geo.frames[j] - 1);

  /* One image's patches on a grid of pixels: where several lie on one, their mean. */
  function raster(codes, j, frame, side) {
    const [w, h] = geo.images[j].size;
    const scale = Math.min(1, side / Math.max(w, h));
    const W = Math.max(1, Math.round(w * scale));
    const H = Math.max(1, Math.round(h * scale));
    const sum = new Float32Array(W * H);
    const count = new Uint16Array(W * H);
    const unseen = new Uint8Array(W * H);
    for (let i = 0; i < codes.length; i++) {
      if (!visible(i, j, frame)) continue;
      const level = codes[i] ? (codes[i] - 1) / LEVELS : 0;
      const x0 = Math.round(geo.box[4 * i] * scale);
      const y0 = Math.round(geo.box[4 * i + 1] * scale);
      const x1 = Math.min(W, Math.max(x0 + 1, Math.round(geo.box[4 * i + 2] * scale)));
      const y1 = Math.min(H, Math.max(y0 + 1, Math.round(geo.box[4 * i + 3] * scale)));
      for (let y = y0; y < y1; y++) for (let x = x0; x < x1; x++) {
        // Code 0 is masked, which is not the same as tiny.
        if (!codes[i]) { unseen[y * W + x] = 1; continue; }
        sum[y * W + x] += level * level;
        count[y * W + x] += 1;
      }
    }
    return {W, H, sum, count, unseen};
  }

  const sheet = document.createElement("canvas");
  function heat(pen, r, x, y, w, h, opacity, smooth) {
    sheet.width = r.W;
    sheet.height = r.H;
    const inner = sheet.getContext("2d");
    const pixels = inner.createImageData(r.W, r.H);
    for (let i = 0; i < r.sum.length; i++) {
      if (!r.count[i]) {
        if (r.unseen[i]) pixels.data.set([150, 150, 150, Math.round(255 * opacity)], 4 * i);
        continue;
      }
      const level = Math.min(1, Math.sqrt(r.sum[i] / r.count[i]));
      const [red, green, blue] = VIRIDIS[Math.round(255 * level)];
      // What gets little lets more of the picture through; at full opacity nothing does.
      pixels.data.set([red, green, blue, Math.round(255 * opacity ** (2 - 1.5 * level))], 4 * i);
    }
    inner.putImageData(pixels, 0, 0);
    pen.save();
    pen.imageSmoothingEnabled = smooth;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(sheet, x, y, w, h);
    pen.restore();
  }

  /* Colours blended between patches: drawn as small as the patches are, enlarged smoothly. */
  function blended(codes, j, frame) {
    let least = Infinity;
    for (let i = 0; i < codes.length; i++) {
      if (visible(i, j, frame)) least = Math.min(least, geo.box[4 * i + 2] - geo.box[4 * i], geo.box[4 * i + 3] - geo.box[4 * i + 1]);
    }
    const side = Math.max(...geo.images[j].size) / Math.max(1, least);
    return raster(codes, j, frame, Math.max(2, Math.min(RASTER, Math.round(side))));
  }

  /* The fewest patches that hold half of what falls on all images. */
  function core(codes) {
    const order = [...codes.keys()].sort((a, b) => codes[b] - codes[a]);
    const mass = (i) => (codes[i] ? ((codes[i] - 1) / LEVELS) ** 2 : 0);
    const half = order.reduce((sum, i) => sum + mass(i), 0) / 2;
    const out = new Set();
    let sum = 0;
    for (const i of order) { if (sum >= half || !mass(i)) break; out.add(i); sum += mass(i); }
    return out;
  }

  function outline(pen, set, f, frame, ratio) {
    const marked = new Uint8Array(geo.at.length);
    set.forEach((i) => { marked[i] = 255; });
    const r = raster(marked, f.j, frame, RASTER);
    const on = (x, y) => x >= 0 && y >= 0 && x < r.W && y < r.H && r.sum[y * r.W + x] > 0;
    const sx = pen.canvas.width / r.W;
    const sy = pen.canvas.height / r.H;
    pen.beginPath();
    for (let y = 0; y <= r.H; y++) {
      for (let x = 0; x <= r.W; x++) {
        if (on(x, y) !== on(x - 1, y)) { pen.moveTo(x * sx, y * sy); pen.lineTo(x * sx, (y + 1) * sy); }
        if (on(x, y) !== on(x, y - 1)) { pen.moveTo(x * sx, y * sy); pen.lineTo((x + 1) * sx, y * sy); }
      }
    }
    twice(pen, "#ffffff", 2 * ratio);
  }

  /* A line that is seen on any ground: dark below, light above. */
  function twice(pen, colour, width, dash) {
    pen.setLineDash([]);
    pen.strokeStyle = "rgba(0, 0, 0, .75)";
    pen.lineWidth = width + 2 * (window.devicePixelRatio || 1);
    pen.stroke();
    pen.setLineDash(dash || []);
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.stroke();
    pen.setLineDash([]);
  }

  function sized(f) {
    const room = $("vision-images").clientWidth || 480;
    const columns = frames.length > 1 && room > 420 ? 2 : 1;
    const most = Math.min(frames.length > 1 ? 360 : 480, (room - 12 * (columns - 1)) / columns - 4);
    const times = most / Math.max(f.w, f.h * 0.9);
    const scale = times > 2 ? Math.floor(times) : times;
    f.box.style.width = `${Math.round(f.w * scale)}px`;
    f.box.style.height = `${Math.round(f.h * scale)}px`;
    const ratio = window.devicePixelRatio || 1;
    const [W, H] = [Math.round(f.w * scale * ratio), Math.round(f.h * scale * ratio)];
    if (f.canvas.width !== W || f.canvas.height !== H) { f.canvas.width = W; f.canvas.height = H; }
    f.picture.classList.toggle("enlarged", scale > 2);
    return ratio;
  }

  let waiting = false;
  function paint() {
    if (waiting) return;
    waiting = true;
    window.requestAnimationFrame(() => { waiting = false; if (geo && main) frames.forEach(draw); });
  }

  function draw(f) {
    const s = hs.state;
    if (s.page !== "vision") return;
    const ratio = sized(f);
    const pen = f.canvas.getContext("2d");
    const frame = Number(s.frame || 0);
    const {width, height} = f.canvas;
    pen.clearRect(0, 0, width, height);
    const opacity = (shown_opacity === null ? Number(s.opacity || 60) : shown_opacity) / 100;
    const smooth = s.smooth === "1";
    const r = smooth ? blended(main.codes, f.j, frame) : raster(main.codes, f.j, frame, RASTER);
    heat(pen, r, 0, 0, width, height, opacity, smooth);
    if (s.contour === "1") outline(pen, core(main.codes), f, frame, ratio);
    const place = (box) => [box[0] * width / f.w, box[1] * height / f.h, (box[2] - box[0]) * width / f.w, (box[3] - box[1]) * height / f.h];
    const set = chosen(s);
    const own = geo.at.map((p, i) => i).filter((i) => set.has(geo.at[i]) && visible(i, f.j, frame));
    const patch = (i) => place(geo.box.slice(4 * i, 4 * i + 4));
    if (own.length) {
      pen.beginPath();
      own.forEach((i) => { const [x, y, w, h] = patch(i); pen.rect(x + ratio, y + ratio, w - 2 * ratio, h - 2 * ratio); });
      twice(pen, "#ff8fb3", 2 * ratio);
    }
    if (s.noboxes !== "1") named(pen, f, place, ratio);
    if (cursor >= 0 && visible(cursor, f.j, frame)) {
      pen.beginPath();
      pen.rect(...patch(cursor));
      twice(pen, "#ffffff", 2 * ratio, [3 * ratio, 3 * ratio]);
    }
    if (drag && drag.f === f && drag.moved) {
      pen.beginPath();
      pen.rect(...place(drag.rect));
      twice(pen, "#ff8fb3", ratio, [4 * ratio, 4 * ratio]);
    }
    f.canvas.setAttribute("aria-label", summary(f.j, frame));
  }

  /* Named boxes with their names; boxes in the same place share a line and a label. */
  function named(pen, f, place, ratio) {
    const groups = new Map();
    for (const [name, [image, ...box]] of Object.entries(geo.named)) {
      if (image !== f.j) continue;
      const key = box.join();
      groups.set(key, {box, names: [...((groups.get(key) || {}).names || []), name]});
    }
    pen.font = `${12 * ratio}px system-ui, "DejaVu Sans", sans-serif`;
    pen.textBaseline = "top";
    groups.forEach(({box, names}) => {
      const [x, y, w, h] = place(box);
      pen.beginPath();
      pen.rect(x, y, w, h);
      twice(pen, "#ffd43b", 2 * ratio, [6 * ratio, 4 * ratio]);
      const text = names.sort().join(", ").slice(0, 40);
      const wide = pen.measureText(text).width + 6 * ratio;
      const high = 16 * ratio;
      const left = Math.max(0, Math.min(x, pen.canvas.width - wide));
      const top = y >= high ? y - high : Math.min(y + h, pen.canvas.height - high);
      pen.fillStyle = "rgba(0, 0, 0, .8)";
      pen.fillRect(left, top, wide, high);
      pen.fillStyle = "#ffd43b";
      pen.fillText(text, left + 3 * ratio, top + 2 * ratio);
    });
  }

  const value = (i) => (main.codes[i] ? main.most * ((main.codes[i] - 1) / LEVELS) ** 2 : 0);

  function where(i) {
    const parts = [`row ${geo.row[i]}, column ${geo.column[i]}`];
    if (geo.tile[i] >= 0) parts.push(`tile ${geo.tile[i]}`);
    if (geo.frames[geo.image[i]] > 1) parts.push(`frame ${geo.frame[i]}`);
    if (geo.images.length > 1) parts.push(`image ${geo.image[i] + 1}`);
    return parts.join(", ");
  }

  function summary(j, frame) {
    const own = [...main.codes.keys()].filter((i) => visible(i, j, frame)).sort((a, b) => main.codes[b] - main.codes[a]);
    const top = own.slice(0, 3).map((i) => `${where(i)}: ${value(i).toPrecision(2)}`).join("; ");
    return `${main.head} from ${query_words(main.query)} on image ${j + 1}: strongest at ${top}`;
  }

  function number(x) { return x >= 0.0995 ? x.toFixed(2) : x === 0 ? "0" : x.toPrecision(2); }

  function facts() {
    const best = main.codes.indexOf(Math.max(...main.codes));
    const parts = hs.head_parts(main.head);
    const to = hs.url({...hs.state, page: "head", prompt: view.prompt, tower: view.tower === "text" ? "" : view.tower, layer: parts.layer, head: parts.head});
    const boxes = Object.keys(geo.named).length && main.mass > 0 ? pointed() : "";
    const line = make("p", {id: "vision-line"}, make("a", {href: to}, main.head),
      ` from ${query_words(main.query)}: ${number(main.mass)} of its attention on ${geo.images.length > 1 ? "the images" : "the image"}; most at ${where(best)}.${boxes}`);
    const bar = make("div", {class: "vision-legend", "aria-hidden": "true"},
      make("span", {}, "0"), make("span", {class: "vision-bar"}), make("span", {}, number(main.most)));
    $("vision-facts").replaceChildren(line, bar, make("p", {id: "vision-spot", class: "faint"}, spot()));
  }

  /* Of the box that is asked about, or the only one: how much lies in it. */
  function pointed() {
    const names = Object.keys(geo.named);
    const name = names.includes(hs.state.vbox) ? hs.state.vbox : names.includes("thing") ? "thing" : names[0];
    const [image, l, t, r, b] = geo.named[name];
    let inside = 0;
    let count = 0;
    geo.at.forEach((_, i) => {
      const [x0, y0, x1, y1] = geo.box.slice(4 * i, 4 * i + 4);
      if (geo.image[i] === image && x0 < r && x1 > l && y0 < b && y1 > t) { inside += value(i); count += 1; }
    });
    const chance = count / geo.at.length;
    return ` Of that ${number(inside / main.mass)} in ${name}, by chance ${number(chance)}.`;
  }

  function spot() {
    const masked = main && main.codes.includes(0) ? " Grey patches are not seen by this query." : "";
    if (cursor < 0 || !main) return `The colours follow the square root of the attention.${masked}`;
    if (!main.codes[cursor]) return `${where(cursor)}, position ${geo.at[cursor]}: not seen by this query`;
    const even = main.mass > 0 ? (value(cursor) / main.mass) * geo.at.length : 0;
    return `${where(cursor)}, position ${geo.at[cursor]}: ${number(value(cursor))}, ${even.toPrecision(2)} times an even share`;
  }

  function point(i) {
    if (i === cursor) return;
    cursor = i;
    const line = $("vision-spot");
    if (line) line.textContent = spot();
    paint();
  }

  /* ---- small maps of the best heads ---- */

  function thumbnails(s) {
    if (!small || !geo) return;
    const panel = $("vision-heads");
    const now = head(s);
    const names = view.heads.map((h) => h[0]);
    const key = `${loaded} ${names.join()}`;
    if (panel.dataset.key !== key) {
      panel.dataset.key = key;
      panel.replaceChildren(...names.map((name) => make("button", {class: "plain", "data-head": name},
        make("canvas", {"aria-hidden": "true"}), make("span", {class: "vision-name"}), make("span", {class: "faint"}))));
      $("vision-heads-note").textContent = `The ${names.length} best by ${view.by === "mass" ? "mass on the image from this query" : view.by}; a click draws one on the image.`;
    }
    const frame = Number(s.frame || 0);
    names.forEach((name, n) => {
      const button = panel.children[n];
      const canvas = button.firstChild;
      const tall = 92;
      const widths = frames.map((f) => Math.max(20, Math.min(180, Math.round(tall * f.w / f.h))));
      const ratio = window.devicePixelRatio || 1;
      canvas.width = Math.min(8, frames.length) && ratio * widths.slice(0, 8).reduce((a, b) => a + b + 2, -2);
      canvas.height = ratio * tall;
      canvas.style.width = `${canvas.width / ratio}px`;
      const pen = canvas.getContext("2d");
      pen.imageSmoothingEnabled = false;
      let x = 0;
      frames.slice(0, 8).forEach((f, k) => {
        const w = widths[k] * ratio;
        if (f.picture.complete && f.picture.naturalWidth) pen.drawImage(f.picture, x, 0, w, canvas.height);
        heat(pen, raster(small[n].codes, f.j, frame, THUMB), x, 0, w, canvas.height, 0.6, false);
        x += w + 2 * ratio;
      });
      const score = view.by === "mass" ? "" : ` · ${view.by} ${number(view.heads[n][1])}`;
      button.children[1].textContent = name;
      button.children[2].textContent = `image ${number(small[n].mass)}`;
      button.setAttribute("aria-label", `${name}: ${number(small[n].mass)} of its attention on the image${score}`);
      button.title = `${name}${score}`;
      button.setAttribute("aria-pressed", String(name === now));
    });
  }
  document.addEventListener("click", (event) => {
    const e = event.target.closest && event.target.closest("#vision-heads [data-head], #vision-readers [data-head]");
    if (e) show(e.dataset.head);
  });
  function place_of(name) {
    const {layer, head: h} = hs.head_parts(name);
    return hs.state.tower || view.tower !== "text" ? {layer, head: h, tower: view.tower} : {layer, head: h};
  }
  function show(name) {
    hs.select(place_of(name), {push: true});
    hs.say(`${name} on the image`);
  }

  /* ---- who reads the chosen patches ---- */

  async function reverse(s, name, q, positions, mine) {
    const note = $("vision-readers-note");
    if (!positions) {
      lit = new Map();
      note.textContent = "Choose patches on an image: the tokens that read them most in this head, and the heads that read them most from this query, are listed here.";
      $("vision-readers").replaceChildren();
      strip(s);
      return;
    }
    const parts = hs.head_parts(name);
    const every = s.every === "1" ? "&every=1" : "";
    const found = await get(`${base()}/${parts.layer}/${parts.head}/readers/${q}?at=${positions}${every}`, (a) => a.json());
    if (update.wanted !== mine || hs.state.patches !== s.patches) return;
    lit = new Map(found.tokens.map(([i, , m]) => [i, m]));
    strip(hs.state);
    note.textContent = `${found.patches} ${found.patches === 1 ? "patch" : "patches"} chosen.`;
    const item = (attributes, text, mass, top) => make("li", {},
      make("button", {class: "plain", ...attributes}, make("bdi", {}, text)),
      make("span", {class: "vision-mass"}, number(mass)),
      make("span", {class: "vision-share", "aria-hidden": "true", style: `width: ${Math.round(140 * mass / top)}px`}));
    const list = (title, items) => make("div", {}, make("h3", {}, title), items.length ? make("ol", {class: "vision-list"}, ...items) : make("p", {class: "faint"}, "none"));
    const top = (rows, k) => Math.max(1e-12, ...rows.map((r) => r[k]));
    const tokens = found.tokens.slice(0, 12);
    $("vision-readers").replaceChildren(
      list(`Tokens that read them in ${name}`, tokens.map(([i, text, m]) => item({"data-token": i}, `${text} (${i})`, m, top(tokens, 2)))),
      list(`Heads that read them from ${query_words(q)}`, found.heads.map(([h, m]) => item({"data-head": h}, h, m, top(found.heads, 1)))),
    );
  }
  document.addEventListener("click", (event) => {
    const e = event.target.closest && event.target.closest("#vision-readers [data-token]");
    if (e) hs.select({lock: `r${e.dataset.token}`});
  });

  /* ---- pointer and keys on an image ---- */

  function pixel(f, event) {
    const r = f.box.getBoundingClientRect();
    const clip = (x, n) => Math.max(0, Math.min(n - 1e-6, x));
    return [clip((event.clientX - r.left - f.box.clientLeft) * f.w / f.box.clientWidth, f.w), clip((event.clientY - r.top - f.box.clientTop) * f.h / f.box.clientHeight, f.h)];
  }

  const area = (i) => (geo.box[4 * i + 2] - geo.box[4 * i]) * (geo.box[4 * i + 3] - geo.box[4 * i + 1]);

  /* Where patches lie on each other, as tiles on the whole image, the smallest. */
  function under(f, [x, y]) {
    const frame = Number(hs.state.frame || 0);
    let best = -1;
    for (let i = 0; i < geo.at.length; i++) {
      const inside = geo.box[4 * i] <= x && x < geo.box[4 * i + 2] && geo.box[4 * i + 1] <= y && y < geo.box[4 * i + 3];
      if (inside && visible(i, f.j, frame) && (best < 0 || area(i) < area(best))) best = i;
    }
    return best;
  }

  function within(f, [l, t, r, b]) {
    const frame = Number(hs.state.frame || 0);
    const out = [];
    for (let i = 0; i < geo.at.length; i++) {
      if (!visible(i, f.j, frame)) continue;
      const wide = Math.min(r, geo.box[4 * i + 2]) - Math.max(l, geo.box[4 * i]);
      const high = Math.min(b, geo.box[4 * i + 3]) - Math.max(t, geo.box[4 * i + 1]);
      if (wide > 0 && high > 0 && wide * high >= area(i) / 2) out.push(geo.at[i]);
    }
    return out;
  }

  function toggle(i, adds) {
    if (i < 0) return;
    const now = chosen(hs.state);
    const p = geo.at[i];
    if (adds) { if (now.has(p)) now.delete(p); else now.add(p); choose(now); return; }
    choose(now.size === 1 && now.has(p) ? new Set() : new Set([p]));
  }

  function wire(f) {
    const {box} = f;
    box.addEventListener("pointermove", (event) => {
      if (drag && drag.f === f) {
        const [x, y] = pixel(f, event);
        const [x0, y0] = drag.from;
        drag.rect = [Math.min(x, x0), Math.min(y, y0), Math.max(x, x0), Math.max(y, y0)];
        drag.moved = drag.moved || Math.hypot(event.clientX - drag.client[0], event.clientY - drag.client[1]) > 4;
        paint();
      } else point(under(f, pixel(f, event)));
    });
    box.addEventListener("pointerleave", () => { if (!drag && document.activeElement !== box) point(-1); });
    box.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      box.focus({preventScroll: true});
      box.setPointerCapture(event.pointerId);
      drag = {f, from: pixel(f, event), client: [event.clientX, event.clientY], moved: false, rect: null};
    });
    box.addEventListener("pointerup", (event) => {
      if (!drag || drag.f !== f) return;
      const done = drag;
      drag = null;
      if (!done.moved) { toggle(under(f, pixel(f, event)), event.shiftKey); return; }
      const found = within(f, done.rect);
      const last = under(f, pixel(f, event));
      const more = found.length ? found : last >= 0 ? [geo.at[last]] : [];
      choose(new Set(event.shiftKey ? [...chosen(hs.state), ...more] : more));
      paint();
    });
    box.addEventListener("pointercancel", () => { drag = null; paint(); });
    box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const by = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key];
      if (by) {
        const next = step(f, by);
        event.preventDefault();
        if (next < 0) return;
        if (event.shiftKey) { const now = chosen(hs.state); if (cursor >= 0) now.add(geo.at[cursor]); now.add(geo.at[next]); choose(now); }
        point(next);
        hs.say(spot());
      } else if (event.key === " " || event.key === "Enter") {
        event.preventDefault();
        toggle(cursor, event.shiftKey || event.key === " ");
      }
    });
  }

  /* The next patch in a direction: the nearest whose middle lies that way, of the same size first. */
  function step(f, [dx, dy]) {
    const frame = Number(hs.state.frame || 0);
    const own = [...geo.at.keys()].filter((i) => visible(i, f.j, frame));
    if (!own.length) return -1;
    if (cursor < 0 || !visible(cursor, f.j, frame)) return own[0];
    const middle = (i) => [(geo.box[4 * i] + geo.box[4 * i + 2]) / 2, (geo.box[4 * i + 1] + geo.box[4 * i + 3]) / 2];
    const [x, y] = middle(cursor);
    let best = -1;
    let least = Infinity;
    for (const i of own) {
      const [px, py] = middle(i);
      const along = (px - x) * dx + (py - y) * dy;
      const aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (along <= 1e-6 || aside > along) continue;
      const other = (geo.tile[i] < 0) !== (geo.tile[cursor] < 0) ? 1e6 : 0;
      if (along + 2 * aside + other < least) { least = along + 2 * aside + other; best = i; }
    }
    return best;
  }

  // Controls that are never empty.
  hs.typed_values["vision-split"] = (x) => x || "layers";
  hs.typed_values["vision-source"] = (x) => x || "query";

  hs.key("Escape", "vision", () => {
    if (hs.state.patches) choose(new Set());
    else if (hs.state.lock) hs.select({lock: ""});
  });

  /* ---- state ---- */

  hs.listen((s, page) => {
    if (page !== "vision" || !view || s.run !== view.run) return;
    // The server will say what stands for another prompt or tower.
    if (view.asked[0] !== (s.prompt || "") || view.asked[1] !== (s.tower || "")) return;
    load(s);
  });
  window.addEventListener("resize", () => { if (hs.state && hs.state.page === "vision") paint(); });

  window.dash_clientside.headscope.vision_place = (data) => {
    view = data || null;
    // After Dash has shown the page's body: what is drawn is measured.
    if (view) window.setTimeout(() => load(hs.state), 0);
    return window.dash_clientside.no_update;
  };
})();
