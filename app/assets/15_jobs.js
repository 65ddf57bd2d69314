/* News of jobs for every page: asked for often while some run, seldom otherwise, never unseen. */
(function () {
  "use strict";
  const hs = window.headscope;
  const FAST = 250;
  const SLOW = 5000;
  // Feeds that list runs: they are asked for again when a job has made one.
  const LISTS = ["shell-run", "runs-list", "compare-runs", "head-which", "intervene-runs", "intervene-result-feed"];
  const watchers = [];
  const enders = [];
  const hushed = new Set();
  let known = new Map();
  let last = {active: 0, jobs: []};
  let detail = null;
  let timer = null;
  let asking = false;
  let again = false;
  let first = true;

  const active = (job) => job.status === "queued" || job.status === "running";

  /* The job of the URL is followed on every page; the page of jobs lists all. */
  function query() {
    const parts = new URLSearchParams();
    const ids = [...known.values()].filter(active).map((j) => j.id);
    if (ids.length) parts.set("known", ids.join(","));
    if (hs.state.page === "jobs") parts.set("all", "1");
    if (hs.state.job) {
      parts.set("job", hs.state.job);
      if (detail && detail.id === hs.state.job && detail.mark) parts.set("mark", detail.mark);
    }
    const text = parts.toString();
    return text ? `/jobs.json?${text}` : "/jobs.json";
  }

  async function ask() {
    window.clearTimeout(timer);
    timer = null;
    if (document.hidden || !hs.config || !hs.config.jobs) return;
    if (asking) { again = true; return; }
    asking = true;
    again = false;
    try {
      const reply = await fetch(query());
      if (reply.ok) take(await reply.json());
    } catch {
      last = {...last, gone: true};
      watchers.forEach((f) => f(last, detail));
    } finally {
      asking = false;
    }
    const busy = last.active > 0 || again;
    timer = window.setTimeout(ask, again ? 0 : busy ? FAST : SLOW);
  }

  function take(news) {
    last = news;
    if (news.job) {
      const log = news.job.log || (detail && detail.id === news.job.id ? detail.log : []);
      detail = {...news.job, log};
    } else if (!hs.state.job || news.lost) {
      detail = null;
    }
    const listed = new Map(news.jobs.map((j) => [j.id, j]));
    if (news.job) listed.set(news.job.id, news.job);
    const over = [];
    for (const [id, job] of listed) {
      const before = known.get(id);
      if (before && active(before) && !active(job)) over.push(job);
      // The page was opened anew on a job that has ended meanwhile: its result is shown, unsaid.
      else if (first && id === hs.state.job && !active(job)) enders.forEach((f) => f(job, true));
    }
    known = listed;
    first = false;
    badge(news.active);
    over.forEach(ended);
    watchers.forEach((f) => f(last, detail));
  }

  function badge(n) {
    const link = document.getElementById("nav-jobs");
    if (!link) return;
    if (n) { link.dataset.count = String(n); link.setAttribute("aria-label", `Jobs, ${n} at work`); }
    else { delete link.dataset.count; link.removeAttribute("aria-label"); }
  }

  function ended(job) {
    if (job.run && job.status === "done") hs.refresh(LISTS);
    const seen = enders.map((f) => f(job, false)).includes(true);
    if (!seen && !hushed.has(job.id)) {
      const words = {done: "is done", failed: "failed", cancelled: "was cancelled"};
      const text = `${job.title} ${words[job.status] || job.status}${job.error ? `: ${job.error}` : ""}`;
      if (job.status === "done" && job.run) hs.toast(text, hs.run_url(job), "show it");
      else hs.toast(text, `/jobs?job=${job.id}`, "its log");
    }
  }

  /* Where the result of a job is looked at. */
  hs.run_url = (job) => hs.url({page: job.page || "heads", run: job.run, ...(hs.state.theme ? {theme: hs.state.theme} : {})});

  /* Run a command as a job. Gives the job, or {error: a line}; the line is said as well.
     {hush}: say nothing when it ends. {follow}: false leaves the job of the URL as it is. */
  hs.submit = async (argv, title, options) => {
    const given = options || {};
    const body = typeof argv === "string" ? {line: argv, title} : {argv, title};
    let made;
    try {
      const reply = await fetch("/jobs", {
        method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
      });
      made = await reply.json();
    } catch {
      made = {error: "the server does not answer"};
    }
    if (!made.id) {
      if (!given.hush) hs.toast(made.error);
      return made;
    }
    if (given.hush) hushed.add(made.id);
    known.set(made.id, made);
    last = {...last, active: last.active + 1};
    badge(last.active);
    if (given.follow !== false) { detail = made; hs.select({job: made.id}); }
    watchers.forEach((f) => f(last, detail));
    ask();
    return made;
  };

  hs.cancel = async (id) => {
    const reply = await fetch(`/jobs/${encodeURIComponent(id)}/cancel`, {method: "POST"});
    const made = await reply.json();
    if (!made.id) hs.toast(made.error);
    ask();
    return made;
  };

  hs.jobs = {
    active,
    get detail() { return detail; },
    /* f(news, job of the URL) after every answer. */
    watch(f) { watchers.push(f); },
    /* f(job, whether it had ended before this page was opened) when a job ends; true says that
       the page shows what came of it, so that nothing else need tell. */
    ended(f) { enders.push(f); },
    ask,
  };

  /* ---- a bar of progress, for every page ---- */

  hs.seconds = (s) => {
    if (s < 1) return "less than 1 s";
    if (s < 90) return `${Math.round(s)} s`;
    return s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
  };

  function progress(job) {
    if (job.status === "queued") return "waits for its turn";
    if (job.status !== "running") return job.status;
    if (job.cancelling) return "ends";
    if (!job.unit) return "begins";
    const left = job.eta_s === undefined || job.eta_s === null ? "" : `, about ${hs.seconds(job.eta_s)} left`;
    return job.total ? `${job.done || 0} of ${job.total} ${job.unit}${left}` : `${job.done || 0} ${job.unit}`;
  }
  hs.progress_text = progress;

  /* An empty bar; `hs.fill` shows a job in it. */
  hs.bar = () => hs.make("div", {class: "job-bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100"}, hs.make("div", {}));
  hs.fill = (bar, job) => {
    const share = job.status === "done" ? 1 : job.total ? Math.min(1, (job.done || 0) / job.total) : null;
    bar.setAttribute("aria-label", `progress of ${job.title}`);
    bar.setAttribute("aria-valuetext", progress(job));
    if (share === null) bar.removeAttribute("aria-valuenow");
    else bar.setAttribute("aria-valuenow", String(Math.round(100 * share)));
    bar.classList.toggle("unknown", share === null && job.status === "running");
    bar.firstChild.style.width = `${share === null ? 0 : 100 * share}%`;
  };

  let followed;
  hs.listen((state, page) => {
    const now = `${page} ${state.job || ""}`;
    if (now === followed) return;
    followed = now;
    if (detail && detail.id !== state.job) detail = null;
    ask();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
})();
