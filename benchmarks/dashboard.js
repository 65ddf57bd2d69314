// What `benchmarks/dashboard.py` does in the page: act, wait for a sign, and for two frames after.
() => {
  const hs = window.headscope;
  const cycle = (name, step, room) => { window[name] = ((window[name] || 0) + step) % room; return window[name]; };
  const other = () => (hs.state.metric === "score-1" ? "score-2" : "score-1");

  const actions = {
    grid: () => hs.refresh(["heads-view"]),
    metric: () => hs.select({metric: other()}),
    head: () => {
      const layer = cycle("layer", 1, 30);
      hs.select({layer, head: (layer * 7) % 32, q: "", k: ""});
    },
    zoom: () => {
      const from = cycle("from", 997, 8192 - window.width);
      hs.select({q: `${8192 - window.width}:8192`, k: `${from}:${from + window.width}`});
    },
    hover: () => {
      const at = cycle("token", 131, 8000);
      const e = document.querySelector(`#tokens .token:nth-child(${at + 100})`);
      e.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, shiftKey: Boolean(window.shift)}));
    },
    tokens: () => hs.select({page: "head", layer: "3", head: "3"}),
    cursor: () => {
      const app = document.getElementById("heads-app");
      app.focus();
      app.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
    },
    sight: async () => {
      const answer = await fetch(`${window.sight}${cycle("query", 1, 60)}?heads=L3H${cycle("seen", 1, 8)}`);
      await answer.arrayBuffer();
      window.fetched();
    },
    atlas: () => {
      const image = document.getElementById("heads-atlas");
      const source = image.src.split("?")[0];
      image.src = `${source}?${Math.random()}`;
    },
  };

  const signs = {
    plot: (id) => new Promise((done) => {
      document.getElementById(id).querySelector(".js-plotly-plot").once("plotly_afterplot", done);
    }),
    row: () => new Promise((done) => document.addEventListener("headscope-row", done, {once: true})),
    tokens: (n) => until(() => document.querySelectorAll("#tokens .token").length === Number(n)),
    image: () => new Promise((done) => document.getElementById("heads-atlas").addEventListener("load", done, {once: true})),
    rows: (id) => new Promise((done) => {
      const box = document.querySelector(`#${id} .ag-center-cols-container`);
      const watch = new MutationObserver(() => { watch.disconnect(); done(); });
      watch.observe(box, {childList: true, subtree: true, characterData: true});
    }),
    fetched: () => new Promise((done) => { window.fetched = done; }),
    none: () => Promise.resolve(),
  };

  async function until(test) {
    while (!test()) await new Promise((done) => setTimeout(done, 4));
  }
  const frames = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const late = () => new Promise((_, fail) => setTimeout(() => fail(new Error("no sign within 20 s")), 20000));

  window.measured = async ([action, sign]) => {
    const [name, argument] = sign.split(":");
    performance.clearResourceTimings();
    const start = performance.now();
    const seen = signs[name](argument);
    actions[action]();
    await Promise.race([seen, late()]);
    await frames();
    const total = performance.now() - start;
    const entries = performance.getEntriesByType("resource").filter((e) => !/jobs/.test(e.name));
    return {total, entries: entries.map((e) => ({
      name: e.name, bytes: e.encodedBodySize || e.transferSize,
      server: e.responseStart - e.requestStart, end: e.responseEnd - start,
    }))};
  };
}
