"""How every figure looks: two themes, colours that everybody can tell apart, inert texts."""

import html
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

SEQUENTIAL, DIVERGING = "Viridis", "RdBu_r"
MASKED = {"light": "#d0d3d8", "dark": "#3a3d42"}
INK = {"light": "#1f2328", "dark": "#e6e8eb"}
FAINT = {"light": "#e3e6ea", "dark": "#3a3f46"}
CLAIM = {"light": "#c2255c", "dark": "#faa2c1"}
SERIES = {
    "light": ("#1c6fb8", "#c2255c", "#2b8a3e", "#9c36b5", "#a55d00", "#0b7285"),
    "dark": ("#74c0fc", "#faa2c1", "#8ce99a", "#e599f7", "#ffc078", "#66d9e8"),
}


def esc(text: object, longest: int = 120) -> str:
    r"""A text that plotly draws as it is: its labels read a kind of HTML.

    >>> esc("<b>a</b>\n& c")
    '&lt;b&gt;a&lt;/b&gt; &amp; c'
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= longest else line[: longest - 1] + "…"
    return html.escape(line, quote=False)


def theme_of(theme: str | None) -> str:
    """`light` or `dark`."""
    return "dark" if theme == "dark" else "light"


def styled(figure: "go.Figure", theme: str | None = None, **layout: Any) -> "go.Figure":
    """A figure in one of the themes, on the ground of whatever it stands on."""
    name = theme_of(theme)
    axis = {
        "gridcolor": FAINT[name], "zerolinecolor": FAINT[name], "linecolor": FAINT[name],
        "tickcolor": FAINT[name], "automargin": True,
    }  # fmt: skip
    base: dict[str, Any] = {
        "template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK[name], "size": 12, "family": "inherit"},
        "margin": {"l": 56, "r": 12, "t": 30, "b": 46}, "hoverlabel": {"align": "left"},
        "colorway": list(SERIES[name]), "dragmode": False,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }  # fmt: skip
    figure.update_layout(**base)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(**layout)
    return figure


def said(message: str, theme: str | None = None) -> "go.Figure":
    """A figure that holds only a line of text: there is nothing to draw, and this is why."""
    import plotly.graph_objects as go

    figure = go.Figure()
    lines = "<br>".join(esc(line, 90) for line in textwrap.wrap(message[:400], 80))
    figure.add_annotation(
        text=lines, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper",
    )  # fmt: skip
    styled(figure, theme, height=160)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure
