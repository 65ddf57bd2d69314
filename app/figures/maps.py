"""Attention maps: a window of a head as a heat map of bytes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.figures.style import MASKED, SEQUENTIAL, esc, styled, theme_of
from interp.traces.pooling import LEVELS, Window, decode

if TYPE_CHECKING:
    import plotly.graph_objects as go

TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SCALES = ("sqrt", "linear", "log")
_LABELLED = 48


def window_figure(
    window: Window,
    *,
    theme: str | None = None,
    scale: str = "sqrt",
    contrast: bool = True,
    queries: Sequence[str] = (),
    keys: Sequence[str] = (),
    colors: str = SEQUENTIAL,
) -> "go.Figure":
    """A window of an attention map; masked cells are grey, brighter is more.

    Args:
        window: the window.
        theme: `light` or `dark`.
        scale: how probabilities become colours: `sqrt`, `linear` or `log`.
        contrast: colours span the window's own largest entry rather than 1.
        queries: token texts of all queries, for labels of small windows.
        keys: token texts of all keys.
        colors: name of a plotly colour scale.
    """
    import plotly.graph_objects as go

    codes = _recoded(window.codes, scale)
    top = int(codes.max()) if contrast and codes.max() > 1 else 255
    figure = go.Figure(
        go.Heatmap(
            # Bytes: plotly sends them as they are, where it would spell out half floats.
            z=np.where(codes == 0, 0, codes).astype(np.uint8),
            x0=window.k0 + (window.pool_k - 1) / 2,
            dx=window.pool_k,
            y0=window.q0 + (window.pool_q - 1) / 2,
            dy=window.pool_q,
            zmin=0,
            zmax=top,
            colorscale=_scale(colors, MASKED[theme_of(theme)], top),
            colorbar=_bar(top, scale),
            hoverinfo="none",
        )
    )
    styled(figure, theme, height=560, margin={"l": 60, "r": 10, "t": 12, "b": 50}, dragmode="zoom")
    figure.update_xaxes(
        title="key", range=[window.k0 - 0.5, window.k1 - 0.5], showgrid=False, constrain="domain"
    )
    figure.update_yaxes(
        title="query", range=[window.q1 - 0.5, window.q0 - 0.5], showgrid=False, constrain="domain"
    )
    for axis, texts, low, high in (
        ("x", keys, window.k0, window.k1),
        ("y", queries, window.q0, window.q1),
    ):
        if window.exact and 0 < high - low <= _LABELLED and len(texts) >= high:
            names = [f"{esc(marked(texts[i]), 14)} {i}" for i in range(low, high)]
            update = figure.update_xaxes if axis == "x" else figure.update_yaxes
            update(tickmode="array", tickvals=list(range(low, high)), ticktext=names, title=None)
            if axis == "x":
                figure.update_xaxes(tickangle=-60)
    return figure


def marked(token: str) -> str:
    r"""A token with what would not be seen made visible, in ASCII.

    >>> marked(" a\n"), marked(""), marked("\t")
    ('·a\\n', '∅', '\\t')
    """
    if not token:
        return "∅"
    shown = token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace(" ", "·")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def _recoded(codes: np.ndarray, scale: str) -> np.ndarray:
    """Codes under another scale, by a table of 256 entries."""
    if scale == "sqrt":
        return codes
    p = decode(np.arange(256, dtype=np.uint8))
    with np.errstate(divide="ignore"):
        x = p if scale == "linear" else 1 + np.log10(np.maximum(p, 1e-5)) / 5
    table = np.nan_to_num(np.rint(1 + LEVELS * np.clip(x, 0, 1))).astype(np.uint8)
    table[0] = 0
    out: np.ndarray = table[codes]
    return out


def _place(p: float, scale: str) -> float:
    x = {"sqrt": p**0.5, "linear": p, "log": 1 + np.log10(max(p, 1e-5)) / 5}[scale]
    return float(1 + LEVELS * max(0.0, x))


def _scale(colors: str, masked: str, top: int) -> list[list[object]]:
    """The scale with a grey step at 0, which is what is masked."""
    from plotly.colors import get_colorscale

    step = 0.5 / max(top, 1)
    rest = [[step + (1 - step) * at, colour] for at, colour in get_colorscale(colors)]
    return [[0.0, masked], [step, masked], *rest]


def _bar(top: int, scale: str) -> dict[str, object]:
    ticks = [p for p in TICKS if _place(p, scale) <= top]
    return {
        "title": {"text": "attention", "side": "right"},
        "tickvals": [_place(p, scale) for p in ticks], "ticktext": [f"{p:g}" for p in ticks],
        "thickness": 12, "outlinewidth": 0,
    }  # fmt: skip
