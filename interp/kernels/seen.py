"""What stands on the query and key sides of a layer's calls.

Most towers have positions of their own that are those of a prompt's view of them; layers of one
tower may differ, and what cross attention reads is a view as well.
"""

from dataclasses import dataclass, field

from interp.errors import SiteError
from interp.images.patches import Windows
from interp.kernels.plan import Plan, Side
from interp.prompts import Batch
from interp.seam.calls import AttnCall
from interp.seam.structure import Tower


@dataclass
class Seen:
    """The batch as a layer sees it.

    Attributes:
        queries: the query side.
        keys: the key side, often the same.
        windows: how the layer cuts each row of keys, or None where it attends over all of it.
        plans: readings compiled for calls of some shape.
    """

    queries: Batch
    keys: Batch
    windows: tuple[Windows, ...] | None = None
    plans: dict[tuple[int, int, bool], Plan] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether the layer attends within windows of its rows."""
        return self.windows is not None and self.queries is self.keys


def whole_view(tower: Tower, batch: Batch, seen: tuple[Batch, tuple[int, ...]] | None) -> Seen:
    """The batch as a tower sees it, given its view of it if it has one."""
    keys = batch.view(f"{tower.name}/keys")
    if keys is not None:
        owners = tuple(range(len(batch))) if seen is None else seen[1]
        if keys[1] != owners:
            raise SiteError(
                f"what tower {tower.name!r} reads must be given for every prompt of a batch alike"
            )
        return Seen(batch if seen is None else seen[0], keys[0], _windows(keys[0]))
    if seen is not None:
        return Seen(seen[0], seen[0], _windows(seen[0]))
    if batch.decoder is None or tower.name not in ("text", "cross"):
        return Seen(batch, batch)
    return Seen(batch.decoder, batch.decoder if tower.name == "text" else batch)


def check_keys(call: AttnCall, seen: Seen) -> None:
    """Refuse keys whose places depend on what else is in the batch."""
    lengths = sorted({len(window) for cut in seen.windows or () for window in cut.places})
    if lengths not in ([], [call.n_key]):
        raise SiteError(
            f"{call.name} has {call.n_key} keys; the images make {' or '.join(map(str, lengths))}",
            hint="give images of one size to a batch",
        )


def _windows(rows: Batch) -> tuple[Windows, ...] | None:
    """How rows are cut, if they are."""
    cut = [None if p.patches is None else p.patches.windows for p in rows.prompts]
    windows = tuple(x for x in cut if x is not None)
    return windows if len(windows) == len(cut) else None


def own_views(tower: Tower, batch: Batch) -> dict[str, Seen]:
    """The batch as those layers see it whose positions are not those of their tower."""
    out: dict[str, Seen] = {}
    made: dict[tuple[int, ...], Seen] = {}
    for layer in tower.layers:
        name = f"{tower.name}/{layer.index}"
        key = tuple(id(p.views.get(name)) for p in batch.prompts)
        if key not in made:
            seen = batch.view(name)
            if seen is None:
                continue
            made[key] = Seen(seen[0], seen[0], _windows(seen[0]))
        out[layer.name] = made[key]
    return out


def width_of(batch: Batch) -> int:
    """Positions of a batch, padding counted."""
    return Side(batch).width
