/* The grid of heads: a cursor moved by keys, a click opens; and zooming of maps. */
(function () {
  "use strict";
  const hs = window.headscope;
  const no = () => window.dash_clientside.no_update;

  function plot(id) {
    const box = document.getElementById(id);
    return box && box.querySelector(".js-plotly-plot");
  }

  function size() {
    const gd = plot("heads-grid");
    const trace = gd && gd.data && gd.data.find((t) => t.type === "heatmap");
    if (!trace || !gd._fullData) return null;
    const z = gd._fullData.find((t) => t.type === "heatmap").z;
    return {rows: z.length, columns: z[0].length};
  }

  /* The box around the head that is selected: laid over the plot, not drawn into it. */
  function ring() {
    const gd = plot("heads-grid");
    const mark = document.getElementById("heads-cursor");
    if (!gd || !mark || !gd._fullLayout || hs.state.layer === undefined) { if (mark) mark.hidden = true; return; }
    const {xaxis, yaxis} = gd._fullLayout;
    if (!xaxis || !yaxis || !xaxis.l2p) return;
    const x = [Number(hs.state.head) - 0.5, Number(hs.state.head) + 0.5].map((v) => xaxis.l2p(v) + xaxis._offset);
    const y = [Number(hs.state.layer) - 0.5, Number(hs.state.layer) + 0.5].map((v) => yaxis.l2p(v) + yaxis._offset);
    const place = gd.getBoundingClientRect();
    const frame = mark.parentElement.getBoundingClientRect();
    mark.hidden = false;
    mark.style.left = `${Math.min(...x) + place.left - frame.left}px`;
    mark.style.top = `${Math.min(...y) + place.top - frame.top}px`;
    mark.style.width = `${Math.abs(x[1] - x[0])}px`;
    mark.style.height = `${Math.abs(y[1] - y[0])}px`;
  }
  hs.listen((s, page) => { if (page === "heads") window.requestAnimationFrame(ring); });
  window.addEventListener("resize", () => window.setTimeout(ring, 60));

  function move(rows, columns) {
    return () => {
      if (document.activeElement !== document.getElementById("heads-app")) return false;
      const room = size();
      if (!room) return false;
      const layer = Math.max(0, Math.min(room.rows - 1, Number(hs.state.layer || 0) + (hs.state.layer === undefined ? 0 : rows)));
      const head = Math.max(0, Math.min(room.columns - 1, Number(hs.state.head || 0) + (hs.state.layer === undefined ? 0 : columns)));
      hs.select({layer, head});
      hs.say(hs.described(hs.head_id()));
      return true;
    };
  }
  hs.key("ArrowUp", "heads", move(-1, 0));
  hs.key("ArrowDown", "heads", move(1, 0));
  hs.key("ArrowLeft", "heads", move(0, -1));
  hs.key("ArrowRight", "heads", move(0, 1));
  hs.key("Enter", "heads", () => {
    if (document.activeElement !== document.getElementById("heads-app") || hs.state.layer === undefined) return false;
    hs.select({page: "head"}, {push: true});
    return true;
  });

  /* The sheet of small maps: whole steps of enlargement, a click opens the head under it. */
  const THUMB = 32;
  document.addEventListener("load", (event) => {
    const image = event.target;
    if (image.id !== "heads-atlas") return;
    const times = Math.max(1, Math.min(4, Math.floor(1200 / image.naturalWidth)));
    image.style.width = `${image.naturalWidth * times}px`;
  }, true);
  document.addEventListener("click", (event) => {
    const image = event.target;
    if (image.id !== "heads-atlas" || !image.naturalWidth) return;
    const scale = image.naturalWidth / image.clientWidth / THUMB;
    hs.select({layer: Math.floor(event.offsetY * scale), head: Math.floor(event.offsetX * scale), page: "head"}, {push: true});
  });

  Object.assign(window.dash_clientside.headscope, {
    /* A click on a figure whose x is a head and whose y is a layer. */
    grid_clicked(click) {
      const point = click && click.points && click.points[0];
      if (point) hs.select({layer: point.y, head: point.x, page: "head"}, {push: true});
      return no();
    },
    /* A click on a point that carries the id of a head. */
    head_clicked(click) {
      const point = click && click.points && click.points[0];
      const id = point && (Array.isArray(point.customdata) ? point.customdata[0] : point.customdata);
      if (id) hs.open_head(id);
      return no();
    },
    /* Points drawn around become the basket. */
    heads_brushed(chosen) {
      const ids = ((chosen && chosen.points) || []).map((p) => (Array.isArray(p.customdata) ? p.customdata[0] : p.customdata)).filter(Boolean);
      if (ids.length) {
        hs.select({basket: ids.slice(0, 200).join(",")});
        hs.say(`${ids.length} heads in the basket`);
      }
      return no();
    },
    /* Rows chosen in a table of heads go into the basket. */
    rows_chosen(rows) {
      if (rows) {
        const basket = rows.map((r) => r.head).join(",");
        if (basket !== (hs.state.basket || "")) hs.select({basket});
      }
      return no();
    },
    /* A cell of a table of heads: its first column opens the head. */
    cell_clicked(cell) {
      if (cell && cell.colId === "head" && cell.value) hs.open_head(cell.value);
      return no();
    },
    compare_chosen(clicks, rows) {
      if (!rows || rows.length !== 2) { hs.toast("choose two runs in the table"); return no(); }
      hs.select({page: "compare", run: rows[0].run, other: rows[1].run}, {push: true});
      return no();
    },
    grid_drawn() { window.setTimeout(ring, 120); return no(); },
    /* Zooming asks for a finer window: the plot holds at most 512 cells a side. */
    zoomed(layout) {
      if (!layout) return no();
      if (layout["xaxis.autorange"] || layout["yaxis.autorange"]) { hs.select({q: "", k: ""}); return no(); }
      const range = (axis) => {
        const a = layout[`${axis}.range[0]`] !== undefined
          ? [layout[`${axis}.range[0]`], layout[`${axis}.range[1]`]] : layout[`${axis}.range`];
        if (!a) return null;
        const low = Math.max(0, Math.round(Math.min(...a) + 0.5));
        const high = Math.round(Math.max(...a) + 0.5);
        return high > low ? `${low}:${high}` : null;
      };
      const patch = {};
      const k = range("xaxis");
      const q = range("yaxis");
      if (k) patch.k = k;
      if (q) patch.q = q;
      if (k || q) hs.select(patch);
      return no();
    },
  });
})();
