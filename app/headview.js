"use strict";
// One head: its map on a canvas, its tokens, and what the token in hand looks at.
(async () => {
  const get = (id) => document.getElementById(id);
  const data = JSON.parse(get("data").textContent);
  const { rows, cols, pool, summary } = data;
  const map = get("map"), mark = get("row"), said = get("said");
  get("summary").textContent = summary;
  map.setAttribute("aria-label", summary);
  let codes;
  try {
    const packed = Uint8Array.from(atob(data.map), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    codes = new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    said.textContent = "The map needs a browser with DecompressionStream (of 2023 or later).";
    return;
  }
  const value = (code) => ((code - 1) / 254) ** 2;
  const written = (code) => {
    const p = value(code);
    return p >= 0.0995 ? p.toFixed(2) : p >= 0.001 ? p.toFixed(3) : p > 0 ? "<0.001" : "0";
  };

  // ---- the map
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const colours = Array.from({ length: 256 }, (_, code) => {
    const t = (Math.max(code - 1, 0) / 254) * 4, i = Math.min(Math.floor(t), 3);
    return stops[i].map((x, c) => x + (stops[i + 1][c] - x) * (t - i));
  });
  function draw() {
    const unseen = getComputedStyle(document.documentElement).getPropertyValue("--unseen")
      .split(",").map(Number);
    map.width = cols;
    map.height = rows;
    const context = map.getContext("2d"), image = context.createImageData(cols, rows);
    codes.forEach((code, n) => image.data.set([...(code ? colours[code] : unseen), 255], 4 * n));
    context.putImageData(image, 0, 0);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();

  // ---- tokens
  const place = (i, axis) => {
    const first = i * pool[axis], last = Math.min(first + pool[axis], data.n[axis]) - 1;
    return first === last ? `${first}` : `${first}\u2013${last}`;
  };
  function list(box, texts, name) {
    const spans = texts.map((text, i) => {
      const span = document.createElement("span");
      span.className = "token";
      span.id = `${name}${i}`;
      span.setAttribute("role", "option");
      span.textContent = text;
      return span;
    });
    box.replaceChildren(...spans);
    return spans;
  }
  const queries = list(get("queries"), data.queries, "q");
  const keys = data.keys ? list(get("keys"), data.keys, "k") : queries;
  const keyTexts = data.keys || data.queries, box = get("queries");
  const panel = get("panel"), lines = get("lines");
  let at = -1, locked = false;

  function strongest(pairs) {
    return pairs.filter(([code]) => code > 1).sort((a, b) => b[0] - a[0]).slice(0, 5);
  }
  function sentence(pairs, texts, axis) {
    const parts = pairs.map(([code, i]) => `${texts[i]} (${place(i, axis)}) ${written(code)}`);
    return parts.length ? parts.join(" \u00b7 ") : "nothing";
  }
  function choose(i) {
    if (i < 0 || i >= rows) return;
    if (at >= 0) {
      queries[at].classList.remove("at");
      queries[at].removeAttribute("aria-selected");
    }
    at = i;
    const row = codes.subarray(i * cols, (i + 1) * cols);
    keys.forEach((span, j) => {
      const a = row[j] > 1 ? ((row[j] - 1) / 254).toFixed(3) : 0;
      span.style.backgroundColor = a ? `rgba(var(--hot),${a})` : "";
      span.style.boxShadow = "";
    });
    const column = [];
    const own = keys === queries;
    for (let r = 0; own && r < rows; r++) {
      const code = codes[r * cols + i];
      if (r !== i && code > 1) {
        column.push([code, r]);
        const a = ((code - 1) / 254).toFixed(3);
        queries[r].style.boxShadow = `inset 0 -3px rgba(var(--cold),${a})`;
      }
    }
    queries[i].classList.add("at");
    queries[i].setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", queries[i].id);
    mark.hidden = false;
    mark.style.top = `${(100 * i) / rows}%`;
    mark.style.height = `max(1px, ${100 / rows}%)`;
    const top = strongest([...row].map((code, j) => [code, j]));
    const texts = [`${data.queries[i]} (${place(i, 0)}) looks at: `,
      sentence(top, keyTexts, 1)];
    if (own) {
      texts.push(`; is looked at by: ${sentence(strongest(column), data.queries, 0)}`);
    }
    said.textContent = texts.join("") + (locked ? " [held: Escape lets go]" : "");
    connect(top);
  }
  function connect(top) {
    const ratio = devicePixelRatio || 1;
    const width = panel.clientWidth, height = panel.scrollHeight;
    // A canvas has a largest size; lines are left out where the text is longer.
    lines.width = Math.min(width * ratio, 8192);
    lines.height = Math.min(height * ratio, 8192);
    lines.style.width = `${lines.width / ratio}px`;
    lines.style.height = `${lines.height / ratio}px`;
    if (keys !== queries) return;
    const context = lines.getContext("2d");
    context.scale(ratio, ratio);
    const hot = getComputedStyle(document.documentElement).getPropertyValue("--cold");
    const centre = (span) => [span.offsetLeft + span.offsetWidth / 2,
      span.offsetTop + span.offsetHeight / 2];
    const [x, y] = centre(queries[at]);
    for (const [code, j] of top) {
      const [u, v] = centre(keys[j]);
      context.strokeStyle = `rgba(${hot},0.7)`;
      context.lineWidth = 0.5 + 3 * ((code - 1) / 254);
      context.beginPath();
      context.moveTo(x, y);
      context.quadraticCurveTo((x + u) / 2, Math.min(y, v) - 14, u, v);
      context.stroke();
    }
  }
  function hold(i) {
    locked = !(locked && at === i);
    choose(i);
  }
  const index = (event) => queries.indexOf(event.target);
  box.addEventListener("pointerover", (event) => {
    if (!locked && index(event) >= 0) choose(index(event));
  });
  box.addEventListener("click", (event) => {
    if (index(event) >= 0) hold(index(event));
  });
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1,
      Home: 0, End: rows - 1 }[event.key];
    if (to !== undefined) {
      choose(Math.max(0, Math.min(rows - 1, to)));
      queries[at].scrollIntoView({ block: "nearest" });
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) hold(at);
    else if (event.key === "Escape") {
      locked = false;
      choose(at);
    } else return;
    event.preventDefault();
  });
  function cell(event) {
    const size = map.getBoundingClientRect();
    const i = Math.floor(((event.clientY - size.top) / size.height) * rows);
    const j = Math.floor(((event.clientX - size.left) / size.width) * cols);
    return [Math.max(0, Math.min(rows - 1, i)), Math.max(0, Math.min(cols - 1, j))];
  }
  const here = get("here");
  map.addEventListener("pointermove", (event) => {
    const [i, j] = cell(event), code = codes[i * cols + j];
    here.textContent = `query ${data.queries[i]} (${place(i, 0)}), key ${keyTexts[j]} ` +
      `(${place(j, 1)}): ${code ? written(code) : data.unseen}`;
    if (!locked && i !== at) choose(i);
  });
  map.addEventListener("click", (event) => hold(cell(event)[0]));
  choose(data.first);
  document.documentElement.dataset.ready = "yes";
})();
