"""A page of the dashboard: one file that registers itself.

The state of the whole application is one flat mapping of texts, held by `app/assets/00_state.js`,
which is its only writer, and kept in the URL. A page says

- which parts of the state each of its *feeds* needs: a feed is a store that is written only while
  the page is visible and one of these parts has changed, so callbacks listen to feeds and never run
  for nothing;
- which of its controls are *bound* to a part of the state: a change of one changes the other.

All pages stay mounted, so that scroll positions and focus survive going to and fro.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from app.dashboard.library import Library, OpenRun
from interp.headid import DEFAULT_TOWER, HeadId
from interp.registry import Registry

if TYPE_CHECKING:
    from dash import Dash
    from dash.development.base_component import Component

    from app.dashboard.jobs import Jobs

Feed = Mapping[str, str]
"""Parts of the state; those that are not set are missing."""


@dataclass(frozen=True)
class Site:
    """What every page can reach.

    Attributes:
        library: the runs.
        jobs: what runs models; None if the server only reads.
    """

    library: Library
    jobs: "Jobs | None" = None

    @property
    def root(self) -> Path:
        """Folder of the runs."""
        return self.library.root

    def run(self, feed: Feed) -> OpenRun:
        """The run that a feed names.

        Raises:
            UnknownNameError: there is none of this name.
        """
        return self.library.open(feed.get("run", ""))


class Layout(Protocol):
    """Makes the page's components once, when the server starts."""

    def __call__(self, site: Site) -> "Component":
        """Components of the page."""
        ...


class Wire(Protocol):
    """Registers the page's callbacks."""

    def __call__(self, app: "Dash", site: Site) -> None:
        """Register its callbacks."""
        ...


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        name: in the state and in ids: `heads`.
        title: in the navigation: `Heads`.
        path: its URL; `{run}`, `{layer}` and `{head}` stand for parts of the state.
        layout: makes its components.
        wire: registers its callbacks.
        feeds: id of each feed to the parts of the state it holds. `page`, `run` and `theme` may be
            asked for as any other.
        binds: id of each bound control to its property and the part of the state:
            `{"heads-metric": ("value", "metric")}`.
        keys: parts of the state that only this page uses; they go into the URL under their names.
        later: feeds that wait a moment, so that what is looked at first is drawn first.
        order: place in the navigation.
        help: one line for the help page.
        python: the Python that shows what a state shows, or None for that of the run.
        command: the command line likewise.
    """

    name: str
    title: str
    path: str
    layout: Layout
    wire: Wire
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    binds: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    order: int = 50
    help: str = ""
    python: "Callable[[Site, Feed], str] | None" = None
    command: "Callable[[Site, Feed], str] | None" = None


PAGES: Registry[Page] = Registry("page", "app.dashboard.pages")


def enter(page: Page) -> Page:
    """Register a page."""
    return PAGES.register(page.name)(page)


def pages() -> list[Page]:
    """All pages, in the order of the navigation."""
    return sorted((PAGES[name] for name in PAGES), key=lambda p: (p.order, p.name))


def head_of(feed: Feed) -> HeadId | None:
    """The head that a feed names."""
    if "layer" not in feed or "head" not in feed:
        return None
    try:
        return HeadId(int(feed["layer"]), int(feed["head"]), feed.get("tower") or DEFAULT_TOWER)
    except ValueError:
        return None


def span_of(text: str | None, n: int) -> tuple[int, int]:
    """A range `a:b` of the state within 0..n; all of it if there is none or it is no range.

    >>> span_of("3:9", 100), span_of(None, 5), span_of("9:3", 5), span_of("90:400", 100)
    ((3, 9), (0, 5), (0, 5), (90, 100))
    """
    try:
        low, high = (int(x) for x in (text or "").split(":"))
    except ValueError:
        return 0, n
    low, high = max(0, low), min(n, high)
    return (low, high) if low < high else (0, n)


def basket_of(feed: Feed) -> tuple[str, ...]:
    """Heads of the basket, in the order they were put there."""
    return tuple(x for x in (feed.get("basket") or "").split(",") if x)


def told(error: Exception) -> str:
    """An error as a line for people, with what to do."""
    hint = getattr(error, "hint", None)
    return f"{error}; {hint}" if hint else str(error)
