/* The state of the application: one flat mapping of texts, kept in the URL, written only here. */
(function () {
  "use strict";

  const CORE = {prompt: "p", tower: "t", metric: "m", q: "q", k: "k", basket: "basket", theme: "theme"};
  const LONG = Object.fromEntries(Object.entries(CORE).map(([long, short]) => [short, long]));
  // What is about one run or one prompt has no meaning in another.
  const OF_RUN = ["prompt", "tower", "layer", "head", "q", "k", "metric", "basket", "lock", "patches", "result"];
  const OF_PROMPT = ["q", "k", "lock", "patches"];
  const listeners = [];
  const fed = {};
  let config = null;
  let state = {};

  /* ---- URL ---- */

  function pattern(path) {
    const names = [];
    const source = path.replace(/\{(\w+)\}/g, (_, name) => { names.push(name); return "([^/]+)"; });
    return {names, expression: new RegExp(`^${source}/?$`)};
  }

  function parse(url) {
    const place = new URL(url, window.location.origin);
    const found = {page: "missing"};
    for (const [name, page] of Object.entries(config.pages)) {
      const {names, expression} = pattern(page.path);
      const match = expression.exec(place.pathname);
      if (match) {
        found.page = name;
        names.forEach((n, i) => { found[n] = decodeURIComponent(match[i + 1]); });
        break;
      }
    }
    for (const [key, value] of place.searchParams) {
      const name = LONG[key] || (config.keys.includes(key) ? key : null);
      if (name && value && value.length <= 2000 && !(name in found)) found[name] = value;
    }
    return found;
  }

  function url(of) {
    const page = config.pages[of.page] || config.pages.runs;
    const used = new Set(["page"]);
    let path = page.path.replace(/\{(\w+)\}/g, (_, name) => {
      used.add(name);
      return encodeURIComponent(of[name] || (name === "layer" || name === "head" ? "0" : "-"));
    });
    const query = new URLSearchParams();
    if (of.run && !used.has("run")) query.set("run", of.run);
    for (const name of Object.keys(of).sort()) {
      const key = CORE[name] || (config.keys.includes(name) ? name : null);
      if (key && !used.has(name) && of[name]) query.set(key, of[name]);
    }
    const text = query.toString().replace(/%3A/g, ":").replace(/%2C/g, ",");
    return text ? `${path}?${text}` : path;
  }

  /* ---- changes ---- */

  function tidy(next) {
    const out = {};
    for (const [name, value] of Object.entries(next)) {
      if (value !== null && value !== undefined && value !== "") out[name] = String(value);
    }
    return out;
  }

  /* Change parts of the state; {push} makes a step that the browser's Back undoes. */
  function select(patch, options) {
    const push = Boolean(options && options.push);
    const next = {...state};
    if ("run" in patch && patch.run !== state.run) OF_RUN.forEach((n) => { delete next[n]; });
    const turned = ["prompt", "tower"].some((n) => n in patch && (patch[n] || "") !== (state[n] || ""));
    if (turned) OF_PROMPT.forEach((n) => { delete next[n]; });
    const made = tidy({...next, ...patch});
    if (JSON.stringify(sorted(made)) === JSON.stringify(sorted(state))) return;
    const before = state.page;
    state = made;
    const address = url(state);
    const here = window.location.pathname + window.location.search;
    const turned_page = state.page !== before;
    if (address !== here) window.history[push ? "pushState" : "replaceState"]({}, "", address);
    apply();
    if (turned_page) begin();
  }

  /* Another page is read from its top, and the keyboard goes on from there. */
  function begin() {
    const main = document.getElementById("main");
    if (main) { main.focus({preventScroll: true}); window.scrollTo(0, 0); }
  }

  function sorted(of) {
    return Object.keys(of).sort().map((n) => [n, of[n]]);
  }

  function go(address) {
    state = tidy({...kept(), ...parse(address)});
    window.history.pushState({}, "", url(state));
    apply();
    begin();
  }

  /* What stays when another page of the same run is opened. */
  function kept() {
    return state.theme ? {theme: state.theme} : {};
  }

  function apply() {
    const page = config.pages[state.page] ? state.page : "missing";
    document.querySelectorAll("[data-page]").forEach((panel) => {
      panel.hidden = panel.dataset.page !== page;
    });
    theme();
    const title = page === "missing" ? "no such page" : config.pages[page].title;
    const about = state.layer !== undefined && page === "head" ? ` L${state.layer}H${state.head}` : "";
    document.title = `${title}${about} · headscope`;
    links(page);
    for (const [id, [prop, name]] of Object.entries(config.binds)) control(id, prop, name);
    // Plots measure the room that they have: it is there once the panel is shown.
    window.dispatchEvent(new Event("resize"));
    feed(page);
    listeners.forEach((f) => f(state, page));
  }

  const shown = {};
  const options = {};
  function control(id, prop, name) {
    const value = state[name] === undefined ? null : state[name];
    if (shown[id] === value) return;
    const first = !(id in shown) && value === null;
    shown[id] = value;
    if (first) return;  // what its page gives it at the start stays
    const typed = typed_values[id] || ((x) => x);
    window.dash_clientside.set_props(id, {[prop]: typed(value)});
  }
  // Controls whose property is no text: how it is made from one.
  const typed_values = {};

  function feed(page) {
    const own = page === "missing" ? {} : config.feeds[page];
    const feeds = {...config.feeds.shell, ...own};
    for (const [id, names] of Object.entries(feeds)) {
      const data = {};
      names.forEach((n) => { if (state[n] !== undefined) data[n] = state[n]; });
      const text = JSON.stringify(data);
      if (fed[id] === text) continue;
      fed[id] = text;
      window.clearTimeout(waiting[id]);
      const send = () => window.dash_clientside.set_props(id, {data});
      if (config.later.includes(id)) waiting[id] = window.setTimeout(send, LATER);
      else send();
    }
  }
  // What need not be there at once waits until what is looked at is drawn, and until keys rest.
  const LATER = 150;
  const waiting = {};

  /* Let callbacks of a feed run again, though nothing of it has changed. */
  function refresh(ids) {
    ids.forEach((id) => { delete fed[id]; });
    feed(config.pages[state.page] ? state.page : "missing");
  }

  function theme() {
    const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    const name = state.theme === "dark" || state.theme === "light" ? state.theme : system;
    const root = document.documentElement;
    if (root.dataset.theme === name) return;
    root.dataset.theme = name;
    root.dataset.agThemeMode = name;
    window.dash_clientside.set_props("mantine", {forceColorScheme: name});
    if (state.theme === undefined && name === "dark") { state.theme = "dark"; }
  }

  /* Links of the navigation lead to the same run. */
  function links(page) {
    document.querySelectorAll("a[data-to]").forEach((a) => {
      const to = config.pages[a.dataset.to];
      const needs = to.path.includes("{run}");
      const target = {...state, page: a.dataset.to};
      if (a.dataset.to !== "head") { delete target.layer; delete target.head; }
      const usable = !needs || Boolean(state.run);
      if (usable) a.setAttribute("href", url(target)); else a.removeAttribute("href");
      a.setAttribute("aria-disabled", String(!usable));
      if (a.dataset.to === page) a.setAttribute("aria-current", "page");
      else a.removeAttribute("aria-current");
    });
  }

  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
    const a = event.target.closest && event.target.closest("a[href]");
    if (!a || !config || a.target || a.hasAttribute("download")) return;
    const to = new URL(a.href, window.location.origin);
    if (to.origin !== window.location.origin || /^\/(data|assets|_dash)/.test(to.pathname)) return;
    if (to.hash && to.pathname === window.location.pathname) return;
    event.preventDefault();
    go(to.pathname + to.search);
  });
  window.addEventListener("popstate", () => {
    if (!config) return;
    state = tidy({...kept(), ...parse(window.location.href)});
    apply();
  });

  /* ---- basket ---- */

  function basket() {
    return state.basket ? state.basket.split(",") : [];
  }

  function toss(head) {
    const now = basket();
    const next = now.includes(head) ? now.filter((h) => h !== head) : [...now, head];
    select({basket: next.join(",")});
    say(now.includes(head) ? `${head} taken out of the basket` : `${head} put into the basket`);
  }

  function head_id(of) {
    const s = of || state;
    if (s.layer === undefined || s.head === undefined) return null;
    const prefix = s.tower && s.tower !== "text" ? `${s.tower}.` : "";
    return `${prefix}L${s.layer}H${s.head}`;
  }

  function head_parts(text) {
    const match = /^(?:([A-Za-z_][\w-]*)\.)?[Ll]?(\d+)(?:\.|[Hh])(\d+)$/.exec(String(text).trim());
    return match && {tower: match[1] || "", layer: match[2], head: match[3]};
  }

  function open_head(text) {
    const parts = head_parts(text);
    if (!parts || !state.run) return false;
    const tower = parts.tower || (state.tower && /\./.test(text) === false ? state.tower : "");
    select({...parts, tower, page: "head"}, {push: true});
    return true;
  }

  function say(text) {
    const live = document.getElementById("live");
    if (live) live.textContent = text;
  }

  const own = {
    get state() { return state; },
    get config() { return config; },
    select, go, url, say, toss, basket, head_id, head_parts, open_head, refresh, typed_values,
    listen(f) { listeners.push(f); if (config) f(state, state.page); },
  };
  window.headscope = own;

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.headscope = {
    /* Called once, when everything is mounted. */
    boot(given) {
      if (config || !given) return window.dash_clientside.no_update;
      config = given;
      state = tidy(parse(window.location.href));
      // After Dash has taken this answer in.
      window.setTimeout(apply, 0);
      return "ready";
    },
    /* A bound control has changed. */
    bound(...args) {
      if (!config) return;
      for (const entry of window.dash_clientside.callback_context.triggered) {
        const id = entry.prop_id.split(".")[0];
        if (!config.binds[id]) continue;
        const value = entry.value;
        const name = config.binds[id][1];
        const lost = (value === null || value === undefined) && state[name] !== undefined;
        // A list of choices drops a value that it does not hold yet: it comes with the choices.
        if (lost && config.choices.includes(id) && !(options[id] || []).includes(state[name])) {
          delete shown[id];
          continue;
        }
        const text = Array.isArray(value) ? value.join(",") : value;
        shown[id] = text === undefined || text === "" ? null : text === null ? null : String(text);
        select({[name]: text});
      }
    },
    /* The choices of bound lists have come. */
    chosen_from(...args) {
      for (const entry of window.dash_clientside.callback_context.triggered) {
        const id = entry.prop_id.split(".")[0];
        options[id] = (entry.value || []).map((d) => (d && typeof d === "object" ? d.value : d));
        if (!config || !config.binds[id]) continue;
        delete shown[id];
        const [prop, name] = config.binds[id];
        if (state[name] !== undefined && options[id].includes(state[name])) {
          window.setTimeout(() => control(id, prop, name), 0);
        }
      }
    },
  };
})();
