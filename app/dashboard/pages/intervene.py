"""Intervene: change what the heads of the basket do, and see it beside random heads."""

from typing import TYPE_CHECKING, Any

from app.dashboard.intervene import (
    KEYS,
    OPERATIONS,
    detector_of,
    form_of,
    line_of,
    operation_of,
    task_of,
    title_of,
)
from app.dashboard.intervene_result import is_intervention, shown
from app.dashboard.page import Feed, Page, Site, enter, told
from app.dashboard.pages.jobs import READ_ONLY
from interp.errors import InterpError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component


def layout(site: Site) -> "Component":
    """The form above, the job under it, results below."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    go: list[Any] = [
        html.Button("Run", id="intervene-go", className="main"),
        html.Button("Estimate", id="intervene-dry", className="plain"),
    ]
    if site.jobs is None:
        go = [html.P(f"{READ_ONLY} This is the command:", role="status")]
    return html.Div(
        [
            html.H1("Intervene"),
            html.Div(
                [
                    html.H2("What to do"),
                    html.Div(id="intervene-basket"),
                    _form(site),
                    html.P(id="intervene-about", className="faint"),
                    html.P(id="intervene-said", role="alert", className="alert"),
                    html.Div(
                        [*go, html.Span(id="intervene-estimate", role="status", className="faint")],
                        className="row",
                    ),
                    html.Pre(id="intervene-command", tabIndex="0", className="job-command",
                             role="group", **{"aria-label": "command of this intervention"}),
                    html.Div(id="intervene-job"),
                ],
                className="card",
            ),
            html.Div(
                [
                    html.H2("What came of it"),
                    dmc.Select(id="intervene-which", label="Result", data=[], size="xs", w=520,
                               searchable=True, placeholder="interventions on this model",
                               nothingFoundMessage="none yet"),
                    html.Div(id="intervene-result", **{"aria-live": "polite"}),
                ],
                className="card",
            ),
            dcc.Store(id="intervene-argv"),
        ]
    )  # fmt: skip


def _form(site: Site) -> "Component":
    import dash_mantine_components as dmc
    from dash import html

    from app.catalog import entries

    groups: dict[str, list[dict[str, str]]] = {}
    for op in OPERATIONS.values():
        groups.setdefault(op.group, []).append({"value": op.name, "label": op.label})

    def number(name: str, label: str, hint: str, **more: Any) -> Any:
        return dmc.NumberInput(
            id=f"intervene-{name}", label=label, placeholder=hint, size="xs", w=90, **more
        )

    def text(name: str, label: str, hint: str, width: int = 150) -> Any:
        return dmc.TextInput(id=f"intervene-{name}", label=label, placeholder=hint, size="xs",
                             w=width, debounce=300)  # fmt: skip

    def field(name: str, made: Any) -> "Component":
        ops = " ".join(o.name for o in OPERATIONS.values() if name in o.fields)
        return html.Div(made, className="intervene-field", **{"data-ops": ops})

    tasks = [{"value": n, "label": n} for n in entries("task")]
    detectors = [{"value": n, "label": n} for n in entries("detector")]
    return html.Div(
        [
            html.Div(
                [
                    dmc.Select(
                        id="intervene-op", label="Operation", size="xs", w=210, value="zero",
                        allowDeselect=False,
                        data=[{"group": g, "items": items} for g, items in groups.items()],
                    ),
                    field("by", dmc.Select(id="intervene-by", label="Detector", size="xs", w=200,
                                           data=detectors, placeholder="of the run",
                                           searchable=True)),
                    field("alpha", number("alpha", "Strength", "default", decimalScale=4)),
                    field("alphas", text("alphas", "Strengths", "default", 130)),
                    field("over", text("over", "Keys", "span:needle or 0:4", 140)),
                    field("at", text("at", "Positions", "all", 130)),
                    field("tokens", number("tokens", "Tokens", "20", min=1)),
                    dmc.Select(id="intervene-task", label="Task", size="xs", w=160, data=tasks,
                               placeholder="of the run", searchable=True, clearable=True),
                    text("param", "Parameters", "needle:lengths=64", 170),
                    number("n", "Prompts", "default", min=1),
                    number("seed", "Seed", "0"),
                    number("draws", "Random sets", "default", min=0),
                ],
                className="row", id="intervene-form",
            ),
            dmc.Textarea(
                id="intervene-texts", label="Own prompts instead of the task, one a line",
                size="xs", autosize=True, minRows=1, maxRows=8, debounce=300,
                persistence=True, persistence_type="session",
            ),
        ]
    )  # fmt: skip


def wire(app: "Dash", site: Site) -> None:
    """Callbacks of the page."""
    from dash import ClientsideFunction, Input, Output, html, no_update

    @app.callback(
        Output("intervene-argv", "data"),
        Output("intervene-command", "children"),
        Output("intervene-said", "children"),
        Output("intervene-about", "children"),
        Output("intervene-task", "placeholder"),
        Output("intervene-by", "placeholder"),
        Input("intervene-form-feed", "data"),
        Input("intervene-texts", "value"),
    )
    def build(feed: Feed | None, texts: str | None) -> Any:
        if not feed or "run" not in feed:
            return (no_update,) * 6
        op = operation_of(feed)
        try:
            info = site.run(feed).info
            task, detector = task_of(info), detector_of(info)
        except InterpError as error:
            return None, "", told(error), op.about, "task", "detector"
        form = form_of(feed, info, texts)
        try:
            argv = line_of(form, op)
            check(site, argv)
        except InterpError as error:
            if not form.heads:  # nothing is wrong yet
                return None, "", "", told(error), task, detector
            return None, "", told(error), op.about, task, detector
        made = {"argv": argv, "title": title_of(form, op), "texts": texts or ""}
        return made, command_of(argv), "", op.about, task, detector

    @app.callback(
        Output("intervene-result", "children"),
        Input("intervene-result-feed", "data"),
    )
    def result(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            if "result" in feed:
                return shown(site.library.open(feed["result"]), feed.get("theme"))
            here = site.run(feed)
            if not is_intervention(here.info):
                return html.P(
                    "No result is chosen. Put heads into the basket, choose what to do to them, "
                    "and run it; or choose an earlier result of this model.", className="faint",
                )  # fmt: skip
            return shown(here, feed.get("theme"))
        except InterpError as error:
            return html.P(told(error), className="alert", role="alert")

    @app.callback(Output("intervene-which", "data"), Input("intervene-runs", "data"))
    def earlier(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            return results(site, feed)
        except InterpError:
            return []

    buttons = (
        ("n_clicks", "intervene-go", "intervene_go"),
        ("n_clicks", "intervene-dry", "intervene_dry"),
    )
    for prop, source, function in (
        ("data", "intervene-argv", "intervene_made"), *(buttons if site.jobs is not None else ()),
    ):  # fmt: skip
        app.clientside_callback(
            ClientsideFunction("headscope", function), Input(source, prop),
            prevent_initial_call=True,
        )  # fmt: skip


def check(site: Site, argv: list[str]) -> None:
    """Refuse a command line that no job could run, before anybody asks for it.

    Raises:
        UsageError: a mistake in what was typed into the form.
    """
    if site.jobs is None:
        return
    from app.dashboard.jobs_line import check_line

    check_line(argv, site.root)


def command_of(argv: list[str]) -> str:
    """The command line for a terminal."""
    import shlex

    return shlex.join(["headscope", *argv])


def results(site: Site, feed: Feed) -> list[dict[str, str]]:
    """Interventions on the same weights, the newest first."""
    weights = site.run(feed).info.get("key", {}).get("fingerprint")
    out = []
    for entry in site.library.entries():
        info = entry.run.info if entry.run is not None else {}
        if not is_intervention(info) or info.get("key", {}).get("fingerprint") != weights:
            continue
        made = str(info.get("created") or "").replace("T", " ").rstrip("Z")
        words = str(info.get("command") or entry.name).removeprefix("headscope ")
        words = words if len(words) < 70 else f"{words[:70]}…"
        out.append({"value": entry.name, "label": f"{made} · {words}"})
    return out


def command(site: Site, feed: Feed) -> str:
    """The command of the intervention that the form asks for; that of the run if for none."""
    try:
        info = site.run(feed).info
        return command_of(line_of(form_of(feed, info, None), operation_of(feed)))
    except InterpError:
        return ""


enter(
    Page(
        "intervene", "Intervene", "/r/{run}/intervene", layout, wire,
        feeds={
            "intervene-form-feed": ("run", "basket", *KEYS),
            "intervene-result-feed": ("run", "result", "theme"),
            "intervene-runs": ("run", "page"),
        },
        binds={
            "intervene-op": ("value", "op"), "intervene-task": ("value", "task"),
            "intervene-n": ("value", "n"), "intervene-seed": ("value", "seed"),
            "intervene-draws": ("value", "draws"), "intervene-alpha": ("value", "alpha"),
            "intervene-alphas": ("value", "alphas"), "intervene-at": ("value", "at"),
            "intervene-over": ("value", "over"), "intervene-by": ("value", "by"),
            "intervene-tokens": ("value", "tokens"), "intervene-param": ("value", "param"),
            "intervene-which": ("value", "result"),
        },
        keys=(*KEYS, "result", "job"), order=5, command=command,
        help="ablate, scale, flatten or blind the heads of the basket, beside random heads",
    )
)  # fmt: skip
