"""Calls whose batch axis holds the windows of rows, taken apart into one call a window.

Positions that are padding are no part of the image: they are left out as queries and as keys, and
keep what the model gave them of each row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from interp.errors import SiteError
from interp.images.patches import Windows
from interp.kernels.places import Place, index_of
from interp.seam.calls import AttnCall


def apart(call: AttnCall, windows: Sequence[Windows]) -> Iterator[tuple[AttnCall, int, Place]]:
    """Each window as a call [1, position, head, d_v], its row, and its positions in it.

    Args:
        call: [window, place, head, d_v], all windows of a row before those of the next.
        windows: of each row.

    Raises:
        SiteError: these are not the windows of the rows.
    """
    places = [(row, window) for row, cut in enumerate(windows) for window in cut.places]
    sides = {len(window) for _, window in places}
    if call.z.shape[0] != len(places) or sides != {call.n_query}:
        raise SiteError(
            f"{call.name} attends in {call.z.shape[0]} windows of {call.n_query} places; the "
            f"images make {len(places)} of {' or '.join(map(str, sorted(sides)))}",
            hint="give images of one size to a batch",
        )
    _check_shift(call, windows)
    for i, (row, window) in enumerate(places):
        slots = torch.tensor(window)
        positions, order = slots.sort()
        order = order[positions >= 0]
        if len(order):
            yield _window(call, i, order), row, Place(slots[order])


def _check_shift(call: AttnCall, windows: Sequence[Windows]) -> None:
    """Refuse windows that are moved where they should not be, as far as the mask tells."""
    if call.mask is None or any(cut.shift is None for cut in windows):
        return
    moved = call.mask.shape[0] > 1
    if moved != any(cut.shift for cut in windows):
        raise SiteError(
            f"{call.name} {'moves' if moved else 'does not move'} its windows, against its "
            f"configuration and the size of the images",
            hint="load the model again: once shown a smaller image, it moves windows no more",
        )


def _window(call: AttnCall, i: int, slots: Tensor) -> AttnCall:
    """Some places of one example of a call, as a call: the others keep their part of each row."""
    at = index_of(slots)
    one = slice(i, i + 1)
    pattern = None if call.pattern is None else call.pattern[one]
    lse = None if call.lse is None else call.lse[one]
    if pattern is None and lse is None and len(slots) < call.n_key:
        pattern = call.rows(i, slice(0, call.n_heads), slice(0, call.n_query))[None]
    mask = None if call.mask is None else call.mask[one if call.mask.shape[0] > 1 else slice(None)]
    if mask is not None:
        mask = mask[..., at]
        mask = mask[..., at, :] if mask.shape[-2] > 1 else mask
    return replace(
        call,
        q=None if call.q is None else call.q[one][:, :, at],
        k=None if call.k is None else call.k[one][:, :, at],
        v=None if call.v is None else call.v[one][:, :, at],
        z=call.z[one][:, at],
        mask=mask,
        lse=None if lse is None else lse[..., at],
        extra=None,
        pattern=None if pattern is None else pattern[..., at, :][..., at],
    )
