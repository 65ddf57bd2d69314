"""How to measure: a form that makes a command line, and a job of it where jobs run."""

import shlex
from typing import TYPE_CHECKING, Any

from app.catalog import entries
from app.dashboard.page import Feed, Site
from interp.errors import InterpError

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

WHAT = (
    ("positions", "heads and layers by positions"), ("patch", "each head, exact"),
    ("atp", "each head, estimate"), ("windows", "windows of layers"),
)  # fmt: skip
FIELDS = ("what", "model", "task", "direction", "metric", "n", "heads", "window", "keys")
UNUSED = {
    "direction": ("windows",), "metric": ("windows",), "heads": ("atp",),
    "window": ("positions", "patch", "atp"), "keys": ("positions", "patch", "atp"),
}  # fmt: skip
"""Fields to what has no use for them."""


def form(site: Site) -> "Component":
    """Fields, the command they make, and a button where the server runs models."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    def text(name: str, label: str, width: int, value: str = "", hint: str = "") -> "Component":
        return dmc.TextInput(
            id=f"patching-do-{name}", label=label, size="xs", w=width, value=value,
            placeholder=hint, debounce=False, disabled="positions" in UNUSED.get(name, ()),
        )  # fmt: skip

    def select(name: str, label: str, width: int, data: Any, value: str) -> "Component":
        return dmc.Select(
            id=f"patching-do-{name}", label=label, size="xs", w=width, data=data, value=value,
            allowDeselect=False,
        )  # fmt: skip

    what = [{"value": v, "label": n} for v, n in WHAT]
    return html.Div(
        [
            html.H2("Measure"),
            html.Div(
                [
                    select("what", "What", 220, what, "positions"),
                    text("model", "Model", 190, hint="folder, hub name or zoo:NAME"),
                    text("task", "Task of pairs", 130, "ioi"),
                    select("direction", "Direction", 110, ["noise", "denoise"], "noise"),
                    select("metric", "Metric", 170, list(entries("metric")), "logit-difference"),
                    dmc.NumberInput(id="patching-do-n", label="Pairs", size="xs", w=80, value=20,
                                    min=1, step=1),
                    text("heads", "Only heads", 130, hint="all, L3, 9.6"),
                    dmc.NumberInput(id="patching-do-window", label="Layers at once", size="xs",
                                    w=110, value=1, min=1, step=1, disabled=True),
                    text("keys", "Hidden tokens", 130, hint="a span, ~span, others"),
                ],
                className="row",
            ),
            html.Pre(id="patching-do-line", tabIndex="0", className="patching-line",
                     **{"aria-label": "the command"}),
            html.Button("Run as a job", id="patching-do", className="main")
            if site.jobs is not None
            else html.P("This server only reads; run the command in a terminal.",
                        className="faint"),
            dcc.Store(id="patching-do-argv"),
        ],
        className="card",
    )  # fmt: skip


def argv_of(asked: dict[str, Any]) -> list[str]:
    """The arguments that fields ask for; what is empty or as it is by default is left out.

    >>> argv_of({"what": "positions", "model": "zoo:planted-ioi", "task": "ioi", "n": 5})
    ['patch', '--positions', '-m', 'zoo:planted-ioi', '--task', 'ioi', '--n', '5']
    """
    given = {k: str(v).strip() for k, v in asked.items() if v not in (None, "")}
    what = given.get("what", "positions")
    out = {
        "positions": ["patch", "--positions"], "patch": ["patch"], "atp": ["attribute", "atp"],
        "windows": ["patch", "--window", given.get("window", "1")],
    }.get(what, ["patch"])  # fmt: skip
    wanted = [("model", "-m", ""), ("task", "--task", ""), ("n", "--n", "20")]
    if what == "windows":
        wanted.append(("keys", "--keys", ""))
    else:
        wanted.append(("metric", "--metric", "logit-difference"))
    if what != "atp":
        wanted.append(("heads", "--heads", "all"))
    if what in ("positions", "patch"):
        wanted.append(("direction", "--direction", "noise"))
    for name, option, default in wanted:
        if given.get(name) and given[name] != default:
            out = [*out, option, given[name]]
    if what == "atp" and given.get("direction", "noise") != "noise":
        out = [*out, "--param", f"atp:direction={given['direction']}"]
    return out


def line_wired(app: "Dash", site: Site) -> None:
    """The command follows the fields; the button makes a job of it."""
    from dash import ClientsideFunction, Input, Output, State, no_update

    @app.callback(Output("patching-do-model", "value"), Input("patching-run", "data"))
    def model(feed: Feed | None) -> Any:
        if not feed or "run" not in feed:
            return no_update
        try:
            return str(site.run(feed).info.get("model") or "")
        except InterpError:
            return no_update

    @app.callback(
        Output("patching-do-line", "children"),
        Output("patching-do-argv", "data"),
        *(Output(f"patching-do-{name}", "disabled") for name in UNUSED),
        *(Input(f"patching-do-{name}", "value") for name in FIELDS),
        prevent_initial_call=True,  # it follows the model, which comes with the run
    )
    def line(*values: Any) -> tuple[Any, ...]:
        asked = dict(zip(FIELDS, values, strict=True))
        argv = argv_of(asked)
        unused = (str(asked["what"]) in kinds for kinds in UNUSED.values())
        return shlex.join(["headscope", *argv]), argv, *unused

    if site.jobs is not None:
        app.clientside_callback(
            ClientsideFunction("headscope", "patching_run"),
            Input("patching-do", "n_clicks"), State("patching-do-argv", "data"),
            prevent_initial_call=True,
        )  # fmt: skip
