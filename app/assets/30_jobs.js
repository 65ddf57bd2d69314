/* The page of jobs: rows are changed in place, so that focus stays where it is. */
(function () {
  "use strict";
  const hs = window.headscope;
  const $ = (id) => document.getElementById(id);
  const rows = new Map();
  let shown = null;

  const clock = (s) => new Date(1000 * s).toLocaleTimeString();
  const set = (e, text) => { if (e.textContent !== text) e.textContent = text; };

  function row(job) {
    const bar = hs.bar();
    const made = {
      bar, box: null,
      name: hs.make("button", {class: "plain job-name", onclick: () => hs.select({job: job.id})}, job.title),
      status: hs.make("span", {class: "badge"}),
      text: hs.make("span", {class: "faint"}),
      when: hs.make("span", {class: "faint"}),
      link: hs.make("a", {hidden: true}, "show the run"),
      stop: hs.make("button", {class: "plain", onclick: () => hs.cancel(job.id), "aria-label": `cancel ${job.title}`}, "cancel"),
    };
    made.box = hs.make("div", {class: "job", role: "group", "aria-label": job.title},
      hs.make("div", {class: "job-head"}, made.status, made.name, made.when),
      bar, hs.make("div", {class: "job-foot"}, made.text, made.link, made.stop));
    return made;
  }

  function update(of, job) {
    set(of.status, job.cancelling ? "ends" : job.status);
    of.status.className = `badge job-${job.status}`;
    of.name.setAttribute("aria-pressed", String(hs.state.job === job.id));
    of.box.classList.toggle("chosen", hs.state.job === job.id);
    set(of.text, job.error || (hs.jobs.active(job) ? hs.progress_text(job) : ""));
    const took = job.finished && job.started ? `${clock(job.created)}, took ${hs.seconds(job.finished - job.started)}` : clock(job.created);
    set(of.when, took);
    of.bar.hidden = !hs.jobs.active(job);
    if (!of.bar.hidden) hs.fill(of.bar, job);
    of.stop.hidden = !hs.jobs.active(job);
    of.stop.disabled = Boolean(job.cancelling);
    of.link.hidden = !(job.run && job.status === "done");
    if (!of.link.hidden) of.link.setAttribute("href", hs.run_url(job));
  }

  function table(news) {
    const box = $("jobs-table");
    if (!box) return;
    $("jobs-none").hidden = news.jobs.length > 0;
    const ids = new Set(news.jobs.map((j) => j.id));
    for (const [id, of] of rows) if (!ids.has(id)) { of.box.remove(); rows.delete(id); }
    news.jobs.forEach((job, i) => {
      if (!rows.has(job.id)) rows.set(job.id, row(job));
      const of = rows.get(job.id);
      update(of, job);
      if (box.children[i] !== of.box) box.insertBefore(of.box, box.children[i] || null);
    });
  }

  function detail(job, news) {
    const box = $("jobs-detail");
    if (!box) return;
    if (!job) {
      const text = news.lost ? `There is no job ${news.lost}: the server has been started anew, or has forgotten it. Its run, if it made one, is kept.` : "Choose a job to see its command and its log.";
      shown = null;
      box.replaceChildren(hs.make("p", {class: "faint"}, text));
      return;
    }
    if (!shown || shown.id !== job.id) {
      const facts = hs.make("p", {class: "faint"});
      const alert = hs.make("p", {class: "alert", role: "alert"});
      const log = hs.make("pre", {class: "job-log", tabindex: "0", role: "group", "aria-label": "log of the job"});
      const command = hs.make("pre", {class: "job-command", tabindex: "0", role: "group", "aria-label": "command"});
      const link = hs.make("a", {hidden: true}, "show the run");
      const bar = hs.bar();
      const copy = hs.make("button", {class: "plain", onclick: () => copied(command)}, "copy");
      const repeat = hs.make("button", {class: "plain", onclick: () => hs.submit(hs.jobs.detail.argv, hs.jobs.detail.title)}, "run again");
      const stop = hs.make("button", {class: "plain", onclick: () => hs.cancel(job.id)}, "cancel");
      shown = {id: job.id, facts, alert, log, command, link, bar, stop, repeat};
      box.replaceChildren(hs.make("h3", {}, job.title), bar, facts, alert,
        hs.make("div", {class: "row"}, link, copy, repeat, stop), command,
        hs.make("h3", {}, "Log"), log);
    }
    const memory = job.peak_rss ? `; at most ${(job.peak_rss / 2 ** 30).toFixed(2)} GiB of memory` : "";
    const took = job.finished && job.started ? `; took ${hs.seconds(job.finished - job.started)}` : "";
    set(shown.facts, `${hs.progress_text(job)}${took}${memory}`);
    set(shown.alert, job.error ? `${job.error}${job.hint ? `. ${job.hint}` : ""}` : "");
    set(shown.command, job.command);
    shown.bar.hidden = !hs.jobs.active(job);
    if (!shown.bar.hidden) hs.fill(shown.bar, job);
    shown.stop.hidden = !hs.jobs.active(job);
    shown.repeat.hidden = hs.jobs.active(job);
    shown.link.hidden = !(job.run && job.status === "done");
    if (!shown.link.hidden) shown.link.setAttribute("href", hs.run_url(job));
    const text = (job.log || []).join("\n");
    if (shown.log.textContent !== text) {
      const low = shown.log.scrollTop + shown.log.clientHeight >= shown.log.scrollHeight - 4;
      shown.log.textContent = text;
      if (low) shown.log.scrollTop = shown.log.scrollHeight;
    }
  }

  async function copied(from) {
    try {
      await navigator.clipboard.writeText(from.textContent);
      hs.say("copied");
    } catch {
      window.getSelection().selectAllChildren(from);
    }
  }

  hs.jobs.watch((news, job) => {
    if (hs.state.page !== "jobs") return;
    if (news.gone) { set($("jobs-said"), "The server does not answer. Jobs go on as long as it runs."); return; }
    set($("jobs-said"), "");
    table(news);
    detail(job, news);
  });

  async function run() {
    const made = await hs.submit($("jobs-line").value.trim(), "", {});
    if (made.id) window.dash_clientside.set_props("jobs-line", {value: ""});
  }
  document.addEventListener("click", (event) => {
    if (event.target.id === "jobs-run") run();
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.id === "jobs-line" && event.key === "Enter") run();
  });
})();
