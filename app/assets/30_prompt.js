/* The page Prompt: texts on their way to the worker and back. Whatever comes from a prompt is put
   into the page as text; texts are never part of the URL. */
(function () {
  "use strict";
  const hs = window.headscope;
  const make = hs.make;
  const $ = (id) => document.getElementById(id);
  const MOST = 1000000;
  const PARTS = {a: "A", b: "B"};
  let place = {run: null, model: "", prompt: null, first: null, works: false};
  let edited = false;   // somebody has written into A: it is not overwritten
  let filled = null;    // the trace whose text stands in A
  let strips = null;    // which pair is drawn
  let needles = null;   // the prompts that were made last
  let link = null;      // of their download
  let ticket = 0;
  const pending = new Map();

  const value = (id) => ($(id) ? $(id).value : "");
  const ticked = (id) => Boolean($(id) && $(id).checked);
  const model = () => value("prompt-model").trim() || place.model || "zoo:needle";
  const texts = () => [value("prompt-a"), value("prompt-b")].filter((t, i) => i === 0 || t.trim());
  const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  function body() {
    return {
      model: model(), run: place.run, texts: texts(), chat: ticked("prompt-chat"),
      generate: Math.trunc(Number(value("prompt-generate"))) || 0,
    };
  }

  /* An answer as JSON; an error with the line that the server gave. */
  async function ask(address, content) {
    let answer;
    try {
      answer = await fetch(address, content === undefined ? {} : {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(content),
      });
    } catch {
      throw new Error("the server does not answer");
    }
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 600));
    return answer.json();
  }

  function alert_in(id, text) {
    $(id).replaceChildren(...(text ? [make("p", {class: "alert", role: "alert"}, text)] : []));
  }

  function too_long() {
    const long = texts().find((t) => t.length > MOST);
    if (!long) return false;
    alert_in("prompt-error", `a prompt must have at most ${MOST.toLocaleString("en")} characters; got ${long.length.toLocaleString("en")}. headscope capture --prompts FILE reads longer ones`);
    return true;
  }

  /* ---- tokens ---- */

  /* marks: class to places. */
  function strip(label, tokens, total, marks, pair) {
    const box = make("div", {class: pair ? "prompt-strip pair" : "prompt-strip", tabindex: "0", role: "group", "aria-label": label});
    const spans = tokens.map((text, i) => {
      const e = document.createElement("bdi");
      e.className = "token";
      e.title = String(i);
      e.dataset.i = i;
      e.textContent = text;
      return e;
    });
    for (const [name, places] of Object.entries(marks)) {
      places.forEach((i) => { if (spans[i]) spans[i].classList.add(name); });
    }
    box.append(...spans);
    if (total > tokens.length) box.append(make("span", {class: "faint"}, ` … ${count(total - tokens.length, "more token")}`));
    return box;
  }

  /* Which tokens differ, in words: the marks are not only colours. */
  function told(align, a, b) {
    const name = (tokens, i) => (i < tokens.length ? tokens[i] : `token ${i}`);
    const some = align.differs.slice(0, 8).map(([i, j]) => `${name(a, i)} / ${name(b, j)} (${i === j ? i : `${i}, ${j}`})`);
    const more = align.differing > some.length && some.length ? `, … ${align.differing - some.length} more` : "";
    const parts = [`${count(align.pairs, "pair")} of tokens, ${align.differing} differ${some.length ? `: ${some.join(", ")}${more}` : ""}`];
    if (align.lone[0] || align.lone[1]) parts.push(`without a counterpart: ${align.lone[0]} of A, ${align.lone[1]} of B`);
    if (!align.searched) parts.push("too much differs: only what begins and ends both alike is paired");
    return `${parts.join("; ")}.`;
  }

  const legend = () => make("p", {class: "prompt-legend"}, "Bold with a double line: differs. Dashed frame: no counterpart. Italic: special token.");

  function marks(align, side) {
    return {differ: align.differs.map((p) => p[side]), lone: side ? align.only_b : align.only_a};
  }

  /* ---- preview ---- */

  function shown(found) {
    const out = [];
    found.prompts.forEach((p, i) => {
      const two = Boolean(found.align);
      const title = two ? (i ? "B" : "A") : p.id;
      if (!two && i > 0) return;
      const names = Object.keys(p.spans).filter((n) => n !== "bos");
      out.push(make("h3", {}, `${title}: ${count(p.count, "token")}`));
      const facts = [`${count(p.special.length, "special token")}`];
      if (found.context) facts.push(`room for ${found.context.toLocaleString("en")}`);
      if (names.length) facts.push(`spans: ${names.join(", ")}`);
      out.push(make("p", {class: "prompt-legend"}, facts.join(", ")));
      if (p.text !== null) {
        out.push(make("p", {class: "prompt-legend"}, "As the chat template writes it:"));
        const pre = make("pre", {class: "prompt-command", tabindex: "0", "aria-label": `${title} through the chat template`});
        pre.textContent = p.text;
        out.push(pre);
      }
      out.push(strip(`tokens of ${title}`, p.tokens, p.count, {special: p.special, ...(two ? marks(found.align, i) : {})}));
    });
    if (found.align) out.push(make("p", {}, told(found.align, found.prompts[0].tokens, found.prompts[1].tokens)));
    out.push(legend());
    if (!found.align && found.total > 1) out.push(make("p", {}, `${count(found.total, "prompt")} in all; the first is shown.`));
    $("prompt-tokens").replaceChildren(...out);
  }

  const UNITS = {bytes: (x) => (x < 1e6 ? `${(x / 1e3).toFixed(1)} kB` : `${(x / 1e6).toFixed(1)} MB`), seconds: (x) => (x < 1 ? "less than 1 s" : `${x.toFixed(0)} s`)};
  const ROWS = ["prompts", "tokens", "longest prompt", "files", "decoding steps", "memory for weights", "memory for a batch", "time"];

  function costs(rows) {
    if (!rows.length) { $("prompt-cost").replaceChildren(); return; }
    const table = make("table", {class: "facts"}, make("caption", {class: "unseen"}, "what running it would take"));
    const inner = make("tbody", {});
    ROWS.forEach((name) => {
      const row = rows.find((r) => r.quantity === name);
      if (!row) return;
      const write = UNITS[row.unit] || ((x) => `${x.toLocaleString("en")}${row.unit ? ` ${row.unit}` : ""}`);
      inner.append(make("tr", {}, make("th", {scope: "row"}, name), make("td", {}, write(row.value)), make("td", {class: "faint"}, row.note || "")));
    });
    table.append(inner);
    $("prompt-cost").replaceChildren(table);
  }

  async function preview() {
    if (too_long()) return;
    const mine = ++ticket;
    alert_in("prompt-error", "");
    $("prompt-status").textContent = `${model()} reads the prompt …`;
    ["prompt-warnings", "prompt-cost", "prompt-tokens"].forEach((id) => $(id).replaceChildren());
    try {
      const found = await ask("/prompt/preview", body());
      if (mine !== ticket) return;
      const total = found.prompts.reduce((n, p) => n + p.count, 0);
      $("prompt-status").textContent = `${found.model}: ${count(found.total, "prompt")}${found.total <= 2 ? `, ${count(total, "token")}` : ""}${found.chat ? "; it has a chat template" : ""}. Nothing was run.`;
      $("prompt-warnings").replaceChildren(...found.warnings.map((w) => make("p", {class: "alert"}, `Warning: ${w}`)));
      costs(found.cost);
      shown(found);
    } catch (error) {
      if (mine !== ticket) return;
      $("prompt-status").textContent = "";
      alert_in("prompt-error", error.message);
    }
  }

  /* ---- jobs ---- */

  async function submit(argv, title, then, where) {
    const made = await hs.submit(argv, title, {hush: true, follow: false});
    if (!made || !made.id) throw new Error((made && made.error) || "the job was not taken");
    pending.set(made.id, {then, where});
    $(where).replaceChildren(make("p", {role: "status"}, `${title}: ${hs.progress_text(made)} `, make("a", {href: `/jobs?job=${made.id}`}, "job")));
  }

  if (hs.jobs) {
    hs.jobs.watch((news) => news.jobs.forEach((job) => {
      const one = pending.get(job.id);
      if (!one || !hs.jobs.active(job)) return;
      const line = $(one.where).querySelector("p");
      if (line) line.firstChild.textContent = `${job.title}: ${hs.progress_text(job)} `;
    }));
    hs.jobs.ended((job) => {
      const one = pending.get(job.id);
      if (!one) return;
      pending.delete(job.id);
      if (job.status === "done" && job.run) one.then(job).catch((error) => alert_in(one.where, error.message));
      else {
        const why = job.error ? `: ${job.error}${job.hint ? `. ${job.hint}` : ""}` : "";
        alert_in(one.where, `${job.title} ${job.status === "failed" ? "failed" : `was ${job.status}`}${why}`);
      }
    });
  }

  async function run() {
    if (too_long()) return;
    alert_in("prompt-error", "");
    $("prompt-run").disabled = true;
    try {
      const two = texts().length > 1;
      const line = await ask("/prompt/line", body());
      await submit(line.argv, line.title, (job) => captured(job, line.ids, two), "prompt-results");
    } catch (error) {
      alert_in("prompt-error", error.message);
    } finally {
      $("prompt-run").disabled = false;
    }
  }

  async function captured(job, ids, two) {
    const traces = await ask(`/prompt/traces/${encodeURIComponent(job.run)}`);
    const found = ids.map((id) => traces.find((t) => t.id === id)).filter(Boolean);
    if (!found.length) throw new Error(`run ${job.run} keeps no trace of these prompts`);
    const head = (t) => hs.url({page: "head", run: job.run, prompt: t.key, layer: "0", head: "0", ...theme()});
    const lines = found.slice(0, 20).map((t, i) => make("p", {},
      `${two ? PARTS[i ? "b" : "a"] : t.id}, ${count(t.count, "token")}: `, make("a", {href: head(t)}, "open its heads")));
    if (found.length > 20) lines.push(make("p", {}, `and ${found.length - 20} more in run ${job.run}`));
    const pair = two && found.length > 1;
    const to = {run: job.run, prompt: found[0].key, ab: pair ? found[1].key : "", abrun: "", dq: "", dk: "", dr: ""};
    filled = found[0].key;
    $("prompt-results").replaceChildren(make("h3", {}, "Result"), ...lines);
    if (hs.state.page === "prompt") {
      if (pair) hs.select(to, {push: true});
      hs.say("the attention is kept");
    } else {
      hs.toast(`${job.title} is kept`, pair ? hs.url({page: "prompt", ...to, ...theme()}) : head(found[0]), "show it");
    }
  }

  const theme = () => (hs.state.theme ? {theme: hs.state.theme} : {});

  /* ---- needles ---- */

  async function needle() {
    alert_in("needle-results", "");
    $("needle-status").textContent = "prompts are being made …";
    needles = null;
    buttons();
    try {
      needles = await ask("/prompt/needle", {
        model: model(), run: place.run, haystack: ticked("needle-own") ? value("prompt-a") : "",
        ...Object.fromEntries(["needle", "answer", "question", "depths", "lengths"].map((n) => [n, value(`needle-${n}`)])),
      });
      $("needle-status").textContent = `${count(needles.count, "prompt")}, ${needles.jsonl.length.toLocaleString("en")} characters, in ${needles.file}`;
      $("needle-jsonl").textContent = needles.jsonl.length > 6000 ? `${needles.jsonl.slice(0, 6000)}…` : needles.jsonl;
      if (link) URL.revokeObjectURL(link);
      link = URL.createObjectURL(new Blob([needles.jsonl], {type: "application/jsonl"}));
      $("needle-download").href = link;
    } catch (error) {
      $("needle-status").textContent = "";
      alert_in("needle-results", error.message);
    }
    buttons();
  }

  function buttons() {
    ["needle-rank", "needle-capture"].forEach((id) => { if ($(id)) $(id).disabled = !needles; });
    ["needle-download", "needle-jsonl"].forEach((id) => { if ($(id)) $(id).hidden = !needles; });
  }

  async function needle_job(kind) {
    try {
      if (kind === "rank") {
        await submit(needles.rank, "retrieval by depth and length", async (job) => {
          const to = {page: "prompt", run: job.run, ...theme()};
          $("needle-results").replaceChildren(make("p", {}, "Scored: ", make("a", {href: hs.url({...to, page: "heads"})}, "all heads"), " of this run."));
          if (hs.state.page === "prompt") hs.select({run: job.run, ab: "", abrun: "", dh: ""}, {push: true});
          else hs.toast(`${job.title} is scored`, hs.url(to), "show it");
        }, "needle-results");
      } else {
        await submit(needles.capture, "attention of needles", async (job) => {
          const traces = await ask(`/prompt/traces/${encodeURIComponent(job.run)}`);
          $("needle-results").replaceChildren(make("p", {}, `${count(traces.length, "trace")}: `,
            make("a", {href: hs.url({page: "head", run: job.run, prompt: traces[0].key, layer: "0", head: "0", ...theme()})}, "open the first")));
        }, "needle-results");
      }
    } catch (error) {
      alert_in("needle-results", error.message);
    }
  }

  /* ---- commands ---- */

  const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replace(/'/g, `'"'"'`)}'`);

  function commands() {
    if (!$("prompt-command")) return;
    const base = ["--model", model()];
    const given = texts();
    const words = ["headscope", "capture", ...base];
    const n = Math.trunc(Number(value("prompt-generate"))) || 0;
    if (n) words.push("--generate", String(n));
    const long = given.some((t) => t.length > 2000 || /^\s*\{/.test(t)) || ticked("prompt-chat");
    if (long) words.push("--prompts", "FILE.jsonl");
    else given.forEach((t) => words.push("--prompt", t.trim() ? t : "TEXT"));
    $("prompt-command").textContent = words.map(quoted).join(" ");
    const parts = ["needle", "question", "answer", "depths", "lengths"].flatMap((k) => ["--param", `needle:${k}=${value(`needle-${k}`)}`]);
    const cells = value("needle-depths").split(",").length * value("needle-lengths").split(",").length;
    $("needle-command").textContent = ["headscope", "rank", "retrieval", ...base, "--n", String(cells), ...parts].map(quoted).join(" ");
  }

  /* ---- the text of a trace, and pairs of traces ---- */

  async function take(key) {
    const run = place.run;
    try {
      const found = await ask(`/prompt/text/${encodeURIComponent(run)}/${encodeURIComponent(key)}`);
      if (place.run !== run) return;
      $("prompt-a").value = found.text;
      $("prompt-source").textContent = `the text of ${found.id}${found.note ? `; ${found.note}` : ""}`;
      filled = key;
      edited = false;
      commands();
      buttons_of_text();
    } catch (error) {
      alert_in("prompt-error", error.message);
    }
  }

  function buttons_of_text() {
    $("prompt-take").hidden = !(place.run && place.prompt && (edited || filled !== place.prompt));
  }

  async function pair(s) {
    const run = s.run && s.run !== "-" ? s.run : "";
    const a = s.prompt || (place.run === run ? place.first : "");
    const key = run && a && s.ab ? [run, a, s.abrun || run, s.ab].map(encodeURIComponent).join("/") : "";
    const wanted = key && s.tower ? `${key}?tower=${encodeURIComponent(s.tower)}` : key;
    if (strips === wanted) return;
    strips = wanted;
    if (!wanted) { $("prompt-strips").replaceChildren(); return; }
    try {
      const found = await ask(`/prompt/pair/${wanted}`);
      if (strips !== wanted) return;
      const totals = [found.align.pairs + found.align.lone[0], found.align.pairs + found.align.lone[1]];
      $("prompt-strips").replaceChildren(
        make("h3", {}, `A: ${count(totals[0], "token")}`), strip("tokens of A", found.a, totals[0], marks(found.align, 0)),
        make("h3", {}, `B: ${count(totals[1], "token")}`), strip("tokens of B", found.b, totals[1], marks(found.align, 1)),
        make("p", {}, told(found.align, found.a, found.b)), legend(),
      );
    } catch (error) {
      alert_in("prompt-strips", error.message);
    }
  }

  /* The field for files is made by a library, late and without a name. */
  function label() {
    const file = document.querySelector("#prompt-upload input[type=file]");
    if (file) file.setAttribute("aria-label", "file with a prompt");
    else window.setTimeout(label, 100);
  }

  function placed(data) {
    if (!data) return;
    place = data;
    label();
    if (place.prompt && place.run && filled !== place.prompt && !edited) take(place.prompt);
    buttons_of_text();
    commands();
    pair(hs.state);
  }

  async function loaded(contents, name) {
    if (!contents) return;
    try {
      const raw = atob(contents.slice(contents.indexOf(",") + 1));
      const bytes = Uint8Array.from(raw, (c) => c.charCodeAt(0));
      $("prompt-a").value = new TextDecoder("utf-8", {fatal: true}).decode(bytes).replace(/^\uFEFF/, "");
      edited = true;
      $("prompt-source").textContent = `${name}, ${count(bytes.length, "byte")}`;
      alert_in("prompt-error", "");
      commands();
      buttons_of_text();
    } catch {
      alert_in("prompt-error", `${name} must hold text in UTF-8`);
    }
  }

  /* ---- what happens on the page ---- */

  const clicks = {
    "prompt-preview": preview, "prompt-run": run, "prompt-take": () => take(place.prompt),
    "prompt-out": () => hs.select({dq: "", dk: ""}), "needle-make": needle,
    "needle-rank": () => needle_job("rank"), "needle-capture": () => needle_job("capture"),
  };
  document.addEventListener("click", (event) => {
    const b = event.target.closest && event.target.closest("#page-prompt button");
    if (b && clicks[b.id] && !b.disabled) clicks[b.id]();
  });
  document.addEventListener("input", (event) => {
    const t = event.target;
    if (!t.closest || !t.closest("#page-prompt")) return;
    if (t.id === "prompt-a") { edited = true; buttons_of_text(); }
    if (t.id.startsWith("needle-") && needles) { needles = null; buttons(); }
    commands();
  });
  document.addEventListener("change", (event) => {
    if (event.target.closest && event.target.closest("#page-prompt")) commands();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (event.target.classList && event.target.classList.contains("prompt-text") && place.works) { event.preventDefault(); preview(); }
  });
  hs.key("z", "prompt", () => hs.select({dq: "", dk: ""}));
  hs.typed_values["prompt-row"] = (x) => (x === null ? "" : Number(x));

  const none = () => window.dash_clientside.no_update;
  Object.assign(window.dash_clientside.headscope, {
    prompt_placed(data) { placed(data); return none(); },
    prompt_loaded(contents, name) { loaded(contents, name); return none(); },
    prompt_clicked(data) {
      const point = data && data.points && data.points[0];
      if (point && Number.isFinite(point.y)) hs.select({dr: String(Math.max(0, Math.floor(point.y)))});
      return none();
    },
    prompt_zoomed(layout) {
      if (!layout) return none();
      if (layout["xaxis.autorange"] || layout["yaxis.autorange"]) { hs.select({dq: "", dk: ""}); return none(); }
      const range = (axis) => {
        const low = layout[`${axis}.range[0]`];
        const high = layout[`${axis}.range[1]`];
        if (low === undefined || high === undefined) return null;
        const a = Math.max(0, Math.round(Math.min(low, high) + 0.5));
        const b = Math.round(Math.max(low, high) + 0.5);
        return b > a ? `${a}:${b}` : null;
      };
      const dk = range("xaxis");
      const dq = range("yaxis");
      if (dk || dq) hs.select({...(dk ? {dk} : {}), ...(dq ? {dq} : {})});
      return none();
    },
  });

  hs.listen((s, page) => {
    if (page !== "prompt") return;
    commands();
    pair(s);
  });
})();
