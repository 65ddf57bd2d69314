"""One head as an HTML page that needs nothing else: for notebooks, mails and web pages.

The map is square-root codes (`interp.traces.pooling`), deflated and in base64, drawn on a canvas.
Each cell is one entry up to `CELLS` tokens; longer prompts are pooled by their maximum, and the
page says so. Tokens come from anybody's text: they are data in JSON in which no tag can end or
begin, are shown as text only, and signs that have no shape of their own are written out. A policy
in the page lets the browser run its one script and nothing else, and open no connection.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.headdata import Seen, seen_of
from app.tokentext import markup, shown
from interp.files import write_atomic
from interp.headid import HeadId

if TYPE_CHECKING:
    from interp.run import Run

__all__ = ["HeadView", "show_head"]

CELLS = 512
"""Cells a side of the map at most."""
STEPS = (1, 2, 4)
"""Of 254 levels of the map every one, or every second or fourth where noise makes a page large."""
LARGEST, TOKEN_BYTES = 120_000, 12_000
"""What the page, and the tokens of an axis in it, may take."""
_HEIGHT = 760


def show_head(run: "Run | str | Path", head: HeadId | str, prompt: str | None = None) -> "HeadView":
    """One head of a run on one prompt, to look at in a notebook or to save as a page.

    Args:
        run: a run, its folder, or its name in `runs/`.
        head: the head, such as `L9H6`.
        prompt: id of the prompt, or its key; the first that holds the head if None.

    Raises:
        RunError: there is no such run, it is damaged, or it keeps no attention of any prompt.
        HeadIdError: the head's id cannot be read, or no prompt holds it.
        UnknownNameError: there is no such prompt.

    Returns:
        An object that a notebook shows; `.save("head.html")` writes it.
    """
    return HeadView(seen_of(run, HeadId.parse(head) if isinstance(head, str) else head, prompt))


@dataclass(frozen=True, repr=False, eq=False)
class HeadView:
    """A head on a prompt, as a page.

    Attributes:
        seen: what is shown.
    """

    seen: Seen

    @property
    def head(self) -> str:
        """Id of the head."""
        return str(self.seen.head)

    @property
    def prompt(self) -> str:
        """Id of the prompt."""
        return self.seen.prompt

    @property
    def note(self) -> str:
        """What the map leaves out; empty if every cell is one entry."""
        return self._made[0].note

    @cached_property
    def _made(self) -> tuple["_Map", str]:
        for packed in _maps(self.seen):
            page = _page(self.seen, packed)
            if len(page) <= LARGEST:
                break
        return packed, page

    @property
    def html(self) -> str:
        """The page."""
        return self._made[1]

    def save(self, path: str | Path) -> Path:
        """Write the page, atomically; returns the file.

        Raises:
            RunError: the file cannot be written.
        """
        write_atomic(Path(path), self.html.encode("ascii"))
        return Path(path)

    def _repr_html_(self) -> str:
        # A page in a frame of its own origin: no names are shared with the notebook or with
        # another head in it, and nothing of the notebook can be reached from it.
        title = markup(f"Attention of {self.head} on prompt {self.prompt}")
        page = escape(self.html)
        return (
            f'<iframe sandbox="allow-scripts" title="{title}" loading="lazy" '
            f'style="width:100%;height:{_HEIGHT}px;border:0;background:transparent" '
            f'srcdoc="{page}"></iframe>'
        )

    def __repr__(self) -> str:
        lines = [f"{self.head} of {self.seen.model} on prompt {self.prompt}", _summary(self.seen)]
        lines += [_score_line(row) for row in self.seen.scores]
        lines += [self.note] if self.note else []
        return "\n".join(lines)


@dataclass(frozen=True)
class _Map:
    """The map as it stands in the page."""

    data: str
    rows: int
    columns: int
    pool: tuple[int, int]
    note: str


def _maps(seen: Seen) -> Iterator[_Map]:
    """The map, each as large as or smaller than the one before."""
    for cells in (CELLS, CELLS // 2, CELLS // 4, CELLS // 8):
        window = seen.window(cells)
        pool = (window.pool_q, window.pool_k)
        for step in STEPS:
            codes = _stepped(window.codes, step)
            data = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode("ascii")
            rows, columns = codes.shape
            yield _Map(data, rows, columns, pool, _note(pool, step))


def _stepped(codes: np.ndarray, step: int) -> np.ndarray:
    """Codes of fewer levels, which deflate better; what is masked stays so."""
    levels = (codes.astype(np.int32) - 1 + step // 2) // step * step
    return np.where(codes == 0, 0, np.minimum(levels, 254) + 1).astype(np.uint8)


def _note(pool: tuple[int, int], step: int) -> str:
    said = []
    if pool != (1, 1):
        said.append(f"each cell is the largest of {pool[0]} queries × {pool[1]} keys")
    if step > 1:
        said.append(f"square roots are rounded to {254 // step} levels")
    return "; ".join([*said, "headscope serve shows every entry"]) if said else ""


def _labels(tokens: Sequence[str], pool: int) -> list[str]:
    """Text of each cell of an axis, together not too long."""
    for most in (32, 12, 6, 3, 1):
        cells = [
            shown("".join(tokens[i : i + pool])[: most * 2 + 1], most)
            for i in range(0, len(tokens), pool)
        ]
        if len(_inline(cells)) <= TOKEN_BYTES:
            break
    return cells


def _inline(value: Any) -> str:
    """JSON that can stand in a script element: in it no tag begins or ends."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(seen: Seen) -> str:
    """What a person who does not see the map is told."""
    text = (
        f"Attention of {seen.head} of {shown(seen.model, 120)} on prompt {shown(seen.prompt, 80)}: "
        f"{seen.n_query} queries, {seen.n_key} keys."
    )
    if seen.strongest:
        pairs = [
            f"{shown(seen.queries[i])} ({i}) to {shown(seen.keys[j])} ({j}) {p:.2f}"
            for i, j, p in seen.strongest
        ]
        text += f" Strongest: {'; '.join(pairs)}."
    return text


def _score_line(row: Mapping[str, Any]) -> str:
    low, high = (_number(row[name]) for name in ("ci_lo", "ci_hi"))
    return (
        f"{row['detector']}: {_number(row['score'])} [{low}, {high}], n {row['n']}, "
        f"null {_number(row['null'])}, q {_number(row['q'])}: {row['verdict']}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


@cache
def _asset(name: str) -> str:
    return files("app").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _page(seen: Seen, packed: _Map) -> str:
    style, script = (_ascii(_asset(f"headview.{kind}")) for kind in ("css", "js"))
    queries = _labels(seen.queries, packed.pool[0])
    keys = _labels(seen.keys, packed.pool[1])
    data = {
        "rows": packed.rows, "cols": packed.columns, "pool": list(packed.pool),
        "n": [seen.n_query, seen.n_key],
        "map": packed.data, "queries": queries, "keys": None if keys == queries else keys,
        "summary": _summary(seen), "unseen": seen.unseen,
        "first": (seen.strongest[0][0] // packed.pool[0]) if seen.strongest else 0,
    }  # fmt: skip
    policy = (
        f"default-src 'none'; script-src 'sha256-{_hash(script)}'; "
        f"style-src 'sha256-{_hash(style)}'"
    )
    name = markup(f"{seen.head} of {seen.model}")
    said = filter(None, (packed.note, *seen.notes))
    notes = "".join(f'<p class="soft">{markup(line[:1].upper() + line[1:])}.</p>' for line in said)
    second = "" if data["keys"] is None else (
        '<h2>Keys</h2><div class="tokens"><div id="keys" class="list" role="listbox" tabindex="0" '
        'aria-label="keys"></div></div>'
    )  # fmt: skip
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{name}</title><style>{style}</style></head><body><main>
<h1>{name}</h1>
<p id="summary" class="soft"></p><noscript><p>The map needs JavaScript.</p></noscript>{notes}
<div class="two"><div>
<div id="frame"><canvas id="map" role="img"></canvas><div id="row" hidden></div></div>
<div class="scale" aria-hidden="true"></div>
<div class="ticks" aria-hidden="true">{_ticks()}</div>
<p class="soft">Rows are queries, columns are keys; grey: {markup(seen.unseen)}.</p>
<p id="here" class="soft"></p>
</div><div>
<h2>Tokens</h2>
<p class="soft">Point or use the arrow keys; click or Enter holds. Filled: what it looks at.
 Underlined: what looks at it.</p>
<div id="panel" class="tokens"><div id="queries" class="list" role="listbox" tabindex="0"
 aria-label="tokens"></div><canvas id="lines" aria-hidden="true"></canvas></div>{second}
<p id="said" aria-live="polite"></p>
</div></div>
{_scores(seen)}{_sums(seen)}
</main><script type="application/json" id="data">{_inline(data)}</script>
<script>{script}</script></body></html>
"""
    return _ascii(page)


def _ascii(text: str) -> str:
    """Without letters that an encoding could turn into others."""
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _ticks() -> str:
    # Quarters of a square-root scale, 0, 1/16, 1/4, 9/16, 1; the stylesheet places them.
    return "".join(f"<span>{x}</span>" for x in ("0", "0.06", "0.25", "0.56", "1"))


def _scores(seen: Seen) -> str:
    if not seen.scores:
        return ""
    names = ("detector", "score", "ci_lo", "ci_hi", "n", "null", "q", "verdict")
    heads = ("detector", "score", "95 % from", "to", "n", "null", "q", "verdict")
    rows = [
        [str(row[n]) if isinstance(row[n], str | int) else _number(row[n]) for n in names]
        for row in seen.scores
    ]
    return f"<h2>Scores</h2>{_table('', heads, rows)}"


def _sums(seen: Seen) -> str:
    return "".join(
        f"<h2>{markup(t.title)}</h2>{_table(t.note, t.columns, t.rows)}" for t in seen.tables
    )


def _table(note: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{markup(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{markup(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    caption = f"<caption>{markup(note)}</caption>" if note else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
