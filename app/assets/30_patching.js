/* Clicks on the maps of the page Patching, and its form. */
(function () {
  "use strict";
  const hs = window.headscope;
  const no = () => window.dash_clientside.no_update;
  const row = (click) => { const point = click && click.points && click.points[0]; return point ? String(point.y) : ""; };

  Object.assign(window.dash_clientside.headscope, {
    /* A cell of the map of heads opens its head. */
    patching_row(click) {
      const name = row(click);
      if (name) hs.open_head(name);
      return no();
    },
    /* A cell of the map of layers leaves that layer's heads in the map of heads. */
    patching_layer(click) {
      const match = /[Ll](\d+)$/.exec(row(click));
      if (match) { hs.select({play: match[1]}); hs.say(`heads of layer ${match[1]}`); }
      return no();
    },
    patching_run(clicks, argv) {
      if (!clicks || !argv) return no();
      if (typeof hs.submit === "function") {
        hs.submit(argv, `${argv[0]} ${argv[1]}`).then((job) => { if (job && job.id) hs.toast("The job waits or runs.", `/jobs?job=${job.id}`, "watch it"); });
      } else hs.toast("This page runs no jobs; copy the command.");
      return no();
    },
  });
})();
