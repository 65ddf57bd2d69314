/* The page that intervenes: which controls an operation has, its job, its estimate. */
(function () {
  "use strict";
  const hs = window.headscope;
  const $ = (id) => document.getElementById(id);
  const no = () => window.dash_clientside.no_update;
  let wanted = null;
  let made = null;
  let estimate = null;

  hs.typed_values["intervene-op"] = (x) => x || "zero";
  for (const name of ["n", "seed", "draws", "alpha", "tokens"]) {
    hs.typed_values[`intervene-${name}`] = (x) => (x === null ? "" : x);
  }
  for (const name of ["alphas", "at", "over", "param"]) {
    hs.typed_values[`intervene-${name}`] = (x) => x || "";
  }

  /* ---- the form ---- */

  hs.listen((state, page) => {
    if (page !== "intervene") return;
    const op = state.op || "zero";
    document.querySelectorAll(".intervene-field").forEach((box) => {
      box.hidden = !box.dataset.ops.split(" ").includes(op);
    });
    const held = hs.basket();
    const box = $("intervene-basket");
    if (box && box.dataset.held !== held.join(",")) {
      box.dataset.held = held.join(",");
      const text = held.length ? `On ${held.length} head${held.length === 1 ? "" : "s"} of the basket: ` : "The basket is empty. ";
      const links = held.slice(0, 24).flatMap((h) => [hs.make("button", {class: "plain", onclick: () => hs.open_head(h), "aria-label": `open ${h}`}, h), " "]);
      const more = held.length > 24 ? [`and ${held.length - 24} more `] : [];
      const add = hs.make("input", {id: "intervene-add", type: "text", size: "10", placeholder: "L1H0", "aria-label": "put a head into the basket"});
      add.addEventListener("keydown", (event) => {
        if (event.key !== "Enter") return;
        const heads = add.value.split(/[\s,]+/).map(hs.head_parts).filter(Boolean)
          .map((p) => `${p.tower && p.tower !== "text" ? `${p.tower}.` : ""}L${p.layer}H${p.head}`)
          .filter((h) => !hs.basket().includes(h));
        if (!heads.length) { hs.say("a head is L12H7 or 12.7"); return; }
        hs.select({basket: [...hs.basket(), ...heads].join(",")});
        $("intervene-add").focus();
      });
      box.replaceChildren(text, ...links, ...more, hs.make("label", {}, "add ", add));
    }
    place();
  });

  document.addEventListener("click", (event) => {
    const take = event.target.closest && event.target.closest(".intervene-take");
    if (!take) return;
    hs.select({basket: take.dataset.heads});
    hs.say("put into the basket");
  });

  /* The server may not have read what was typed last. */
  async function settled() {
    const field = $("intervene-texts");
    for (let i = 0; i < 30; i += 1) {
      if (wanted && (!field || wanted.texts === field.value)) return wanted;
      await new Promise((done) => window.setTimeout(done, 100));
    }
    return wanted;
  }

  function said(text) {
    if ($("intervene-estimate")) $("intervene-estimate").textContent = text;
  }

  Object.assign(window.dash_clientside.headscope, {
    intervene_made(data) {
      wanted = data || null;
      for (const id of ["intervene-go", "intervene-dry"]) if ($(id)) $(id).disabled = !wanted;
      said("");
      return no();
    },
    intervene_go() {
      settled().then(async (asked) => {
        if (!asked) return;
        said("");
        const found = await hs.submit(asked.argv, asked.title);
        if (found.error && !found.id) said(found.error);
      });
      return no();
    },
    intervene_dry() {
      settled().then(async (asked) => {
        if (!asked) return;
        said("counting…");
        const found = await hs.submit([...asked.argv, "--dry-run", "--format", "jsonl"], `estimate: ${asked.title}`, {hush: true, follow: false});
        if (!found.id) { said(found.error); return; }
        estimate = found.id;
      });
      return no();
    },
  });

  /* ---- the job ---- */

  function place() {
    const box = $("intervene-job");
    if (!box) return;
    const now = hs.jobs.detail;
    const shown = now && now.id === hs.state.job ? now : null;
    if (!shown) { box.replaceChildren(); made = null; return; }
    if (!made || made.id !== shown.id) {
      made = {
        id: shown.id, bar: hs.bar(), text: hs.make("span", {class: "faint"}),
        alert: hs.make("p", {class: "alert", role: "alert"}),
        stop: hs.make("button", {class: "plain", onclick: () => hs.cancel(shown.id)}, "cancel"),
        log: hs.make("a", {href: `/jobs?job=${shown.id}`}, "its log"),
      };
      box.replaceChildren(hs.make("h3", {}, shown.title), made.bar,
        hs.make("div", {class: "row"}, made.text, made.stop, made.log), made.alert);
    }
    const at_work = hs.jobs.active(shown);
    hs.fill(made.bar, shown);
    made.bar.hidden = !at_work;
    made.text.textContent = hs.progress_text(shown);
    made.stop.hidden = !at_work;
    made.stop.disabled = Boolean(shown.cancelling);
    made.alert.textContent = shown.error ? `${shown.error}${shown.hint ? `. ${shown.hint}` : ""}` : "";
  }

  const number = (x) => Math.round(x).toLocaleString("en").replace(/,/g, " ");
  async function counted(id) {
    const news = await (await fetch(`/jobs.json?job=${id}`)).json();
    const done = news.job;
    if (!done || done.status !== "done") { said(done && done.error ? done.error : "no estimate"); return; }
    const rows = {};
    for (const line of done.log) {
      if (line[0] !== "{") continue;
      try { const row = JSON.parse(line); rows[row.quantity] = row.value; } catch { /* no row */ }
    }
    const gib = (x) => `${(x / 2 ** 30).toFixed(2)} GiB`;
    said(`${number(rows.prompts)} prompts of ${number(rows.tokens)} tokens, ${number(rows["tokens through the model"])} through the model; ` +
      `weights ${gib(rows["memory for weights"])}, a batch ${gib(rows["memory for a batch"])}; time ${hs.seconds(rows.time)} (an estimate)`);
  }

  hs.jobs.watch(() => { if (hs.state.page === "intervene") place(); });
  hs.jobs.ended((over, before) => {
    if (over.id === estimate) { estimate = null; counted(over.id); return true; }
    if (hs.state.page !== "intervene" || hs.state.job !== over.id) return false;
    if (over.status !== "done" || !over.run || over.page !== "intervene") return false;
    if (before && hs.state.result) return false;
    hs.select({result: over.run});
    hs.say(`${over.title} is done`);
    return true;
  });
})();
