"""The parts of the page Prompt: text, preview, difference, needles."""

from typing import TYPE_CHECKING

from app.dashboard.page import Site

if TYPE_CHECKING:
    from dash.development.base_component import Component

_UPLOAD = 2_000_000


def writing(site: Site) -> "Component":
    """Where prompts are written, and what is done with them."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    buttons = [
        html.Button("Preview", id="prompt-preview", className="plain"),
        html.Button("Run", id="prompt-run", className="main"),
    ]
    return html.Div(
        [
            html.H2("Text"),
            dmc.Autocomplete(
                id="prompt-model", data=[], size="xs", debounce=400,
                label="Model: a folder, a hub name or zoo:NAME; that of the run if empty",
            ),
            _area("prompt-a", "Prompt A", "One prompt, or prompts as JSONL, one a line.", 7),
            html.Div(
                [
                    dcc.Upload(
                        html.Button("Load a file", className="plain", type="button"),
                        id="prompt-upload", max_size=_UPLOAD, multiple=False,
                        accept=".txt,.jsonl,.ndjson,.json,text/plain",
                    ),
                    html.Button("Text of the chosen prompt", id="prompt-take", className="plain",
                                hidden=True),
                    html.Span("text or JSONL, at most 2 MB", id="prompt-source",
                              className="faint"),
                ],
                className="row",
            ),
            _area("prompt-b", "Prompt B, to compare with A (may be empty)", "", 4),
            html.Div(
                [
                    dmc.NumberInput(id="prompt-generate", label="Generate tokens", value=0, min=0,
                                    max=4096, size="xs", w=130),
                    dmc.Checkbox(id="prompt-chat", label="Apply the chat template", size="xs"),
                ],
                className="row",
            ),
            html.Div(buttons if site.jobs is not None else [], className="row prompt-buttons"),
            *([] if site.jobs is not None else [html.P(
                "This server only reads. In a terminal:", className="faint")]),
            html.H3("As a command"),
            html.Pre(id="prompt-command", className="prompt-command", tabIndex="0",
                     **{"aria-label": "the command that does the same"}),
        ],
        className="card",
    )  # fmt: skip


def _area(id: str, label: str, hint: str, rows: int) -> "Component":
    from dash import html

    return html.Div(
        [
            html.Label(label, htmlFor=id),
            html.Textarea(id=id, rows=rows, className="prompt-text", spellCheck="false",
                          placeholder=hint, dir="auto"),
        ]
    )  # fmt: skip


def seen(site: Site) -> "Component":
    """What a model makes of them."""
    from dash import html

    empty = (
        "Nothing is previewed yet." if site.jobs is not None
        else "A server that only reads runs no model: it shows no preview."
    )  # fmt: skip
    return html.Div(
        [
            html.H2("Preview"),
            html.P(empty, id="prompt-status", role="status"),
            html.Div(id="prompt-error"),
            html.Div(id="prompt-warnings"),
            html.Div(id="prompt-cost"),
            html.Div(id="prompt-tokens"),
            html.Div(id="prompt-results"),
        ],
        className="card",
    )


def compared() -> "Component":
    """A minus B: what is compared, its map, one row of it."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    def choice(id: str, label: str, width: int) -> "Component":
        return dmc.Select(id=id, label=label, data=[], size="xs", w=width, searchable=True,
                          clearable=True, nothingFoundMessage="none")  # fmt: skip

    return html.Div(
        [
            html.H2("A − B"),
            html.P(id="prompt-ab-note", className="faint"),
            html.Div(
                [
                    choice("prompt-one", "A", 190),
                    choice("prompt-other-run", "Run of B", 260),
                    choice("prompt-other", "B", 190),
                    choice("prompt-head", "Head", 110),
                    dmc.NumberInput(id="prompt-row", label="Row", min=0, size="xs", w=90),
                    html.Button("whole map", id="prompt-out", className="plain"),
                ],
                className="row",
            ),
            html.Div(id="prompt-strips"),
            html.Div(
                [
                    html.Div(
                        [
                            html.H3("Map"),
                            html.Div(
                                dcc.Graph(id="prompt-map", config={"displaylogo": False}),
                                role="group",
                                **{"aria-labelledby": "prompt-map-text"},
                            ),
                            html.P(id="prompt-map-text", className="faint"),
                        ],
                        className="prompt-part",
                    ),
                    html.Div(
                        [
                            html.H3("Row"),
                            html.Div(
                                dcc.Graph(id="prompt-bars", config={"displaylogo": False}),
                                role="group",
                                **{"aria-labelledby": "prompt-bars-text"},
                            ),
                            html.P(id="prompt-bars-text", className="faint"),
                        ],
                        className="prompt-part",
                    ),
                ],
                className="columns",
            ),
        ],
        className="card",
    )


def needles(site: Site) -> "Component":
    """The form that hides a needle, and scores by depth and length."""
    import dash_mantine_components as dmc
    from dash import dcc, html

    def line(id: str, label: str, value: str, width: str = "100%") -> "Component":
        return dmc.TextInput(id=id, label=label, value=value, size="xs", w=width)

    form = html.Div(
        [
            html.H3("Prompts"),
            line("needle-needle", "Needle", "Note: Cedar lemon kite drum."),
            line("needle-answer", "Answer, a part of the needle", "lemon kite drum"),
            line("needle-question", "Question", "Recall: Cedar"),
            html.Div(
                [
                    line("needle-depths", "Depths, 0 to 1", "0,0.25,0.5,0.75,1", "170px"),
                    line("needle-lengths", "Lengths in tokens", "128,256,512", "170px"),
                    dmc.Checkbox(id="needle-own", size="xs", label="The haystack is prompt A"),
                ],
                className="row",
            ),
            html.Div(
                [
                    html.Button("Make prompts", id="needle-make", className="plain"),
                    html.Button("Score retrieval", id="needle-rank", className="main",
                                disabled=True),
                    html.Button("Keep attention", id="needle-capture", className="plain",
                                disabled=True),
                    html.A("Download", id="needle-download", download="needle.jsonl", hidden=True),
                ] if site.jobs is not None else [],
                className="row prompt-buttons",
            ),
            html.P(id="needle-status", role="status"),
            html.Pre(id="needle-jsonl", className="prompt-command", tabIndex="0", hidden=True,
                     **{"aria-label": "the prompts as JSONL"}),
            html.H3("As a command"),
            html.Pre(id="needle-command", className="prompt-command", tabIndex="0",
                     **{"aria-label": "the command that scores such prompts"}),
            html.Div(id="needle-results"),
        ],
        className="prompt-part",
    )  # fmt: skip
    found = html.Div(
        [
            html.H3("Retrieval by depth and length"),
            html.Div(
                dcc.Graph(id="prompt-grid", config={"displaylogo": False}),
                role="group",
                **{"aria-labelledby": "prompt-grid-text"},
            ),
            html.P(id="prompt-grid-text", className="faint"),
        ],
        className="prompt-part",
    )
    return html.Div(
        [html.H2("Needle in a haystack"), html.Div([form, found], className="columns")],
        className="card",
    )
