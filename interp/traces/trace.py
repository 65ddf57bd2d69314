"""Reading traces: any row, column or window of any head, with numpy alone.

A trace is a folder:

    trace.json              the prompt: id, tokens, spans; towers and layers; written last
    TOWER-LAYER.safetensors one layer: queries, keys, log-sum-exps, overviews, summaries
    pictures.safetensors    images of the prompt, and the patch of each position, if it has any

A layer is kept in one of three forms, and says which:

    exact   q, k and LSE; checked at capture against the model's own rows
    rows    the whole pattern in half precision: the layer's scores are no function of q·k that
            is known here, or were never reached
    top     the largest entries of each row, for long prompts of such layers
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from interp.errors import HeadIdError, InputError, RunError, UnknownNameError
from interp.files import disk_errors, read_json, read_part, read_table
from interp.headid import HeadId
from interp.traces.pooling import CELLS, Window, aligned, encode, pooled

SCHEMA, VERSION = "headscope.trace", 1
FOLDER, INFO, PICTURES = "traces", "trace.json", "pictures.safetensors"
EXACT, ROWS, TOP = "exact", "rows", "top"
LARGEST = 4096
"""Entries a side that a window computes; a wider one is answered from a coarser level, if kept."""


def traces_of(run_folder: str | Path) -> "dict[str, Trace]":
    """The complete traces of a run by key, in the order of their names."""
    place = Path(run_folder) / FOLDER
    if not place.is_dir():
        return {}
    with disk_errors(place, "read"):
        keys = sorted(p.name for p in place.iterdir() if (p / INFO).exists())
    return {key: Trace(place / key) for key in keys}


class Trace:
    """The trace of one prompt.

    Attributes:
        folder: where it lies.
        info: contents of `trace.json`.

    Raises:
        RunError: damaged, or of a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info: Mapping[str, Any] = read_json(self.folder / INFO)
        if self.info.get("schema") != SCHEMA:
            raise RunError(f"{self.folder} must hold a trace; its schema is not {SCHEMA!r}")
        if int(self.info.get("version", 0)) > VERSION:
            raise RunError(
                f"{self.folder} is a trace of version {self.info['version']}; this program reads "
                f"version {VERSION}",
                hint="update headscope",
            )
        for name, kind in {"tokens": list, "towers": dict, "spans": dict, "id": str}.items():
            if not isinstance(self.info.get(name), kind):
                raise RunError(f"{self.folder / INFO} is damaged: {name!r} must be a {kind}")

    @property
    def key(self) -> str:
        """Name of the folder: a hash of what was read."""
        return self.folder.name

    @property
    def id(self) -> str:
        """Id of the prompt."""
        return str(self.info["id"])

    @property
    def tokens(self) -> list[str]:
        """Text of each token of the prompt."""
        return list(self.info["tokens"])

    @cached_property
    def towers(self) -> "dict[str, TowerTrace]":
        """What was kept of each tower."""
        return {name: TowerTrace(self, name, about) for name, about in self.info["towers"].items()}

    def tower(self, name: str) -> "TowerTrace":
        """One tower.

        Raises:
            UnknownNameError: it was not kept.
        """
        if name not in self.towers:
            raise UnknownNameError("tower of this trace", name, self.towers)
        return self.towers[name]

    def layer(self, tower: str, index: int) -> "LayerTrace":
        """One layer.

        Raises:
            UnknownNameError: the tower was not kept.
            HeadIdError: the layer was not kept.
        """
        found = self.tower(tower).layers.get(index)
        if found is None:
            kept = ", ".join(map(str, self.tower(tower).layers))
            raise HeadIdError(f"layer {index} of {tower} was not kept in this trace; kept: {kept}")
        return found

    def head(self, head: HeadId | str) -> "HeadTrace":
        """One head.

        Raises:
            HeadIdError: it was not kept, or its id cannot be read.
        """
        head = HeadId.parse(head) if isinstance(head, str) else head
        layer = self.layer(head.tower, head.layer)
        if head.head >= layer.n_heads:
            raise HeadIdError(f"{head} is outside this trace: the layer has {layer.n_heads} heads")
        return HeadTrace(layer, head.head)

    @property
    def has_pictures(self) -> bool:
        """Whether the prompt has images."""
        return (self.folder / PICTURES).exists()

    @cached_property
    def pictures(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Images as bytes of PNG files, `AXIS/places`, `AXIS/boxes`; and facts about them.

        Raises:
            RunError: there are none, or they are damaged.
        """
        return read_table(self.folder / PICTURES)


@dataclass(frozen=True)
class TowerTrace:
    """What a trace keeps of one tower.

    Attributes:
        trace: the trace.
        name: name of the tower.
        about: its entry in `trace.json`.
    """

    trace: Trace
    name: str
    about: Mapping[str, Any]

    @property
    def n_query(self) -> int:
        """Query positions."""
        return int(self.about["n_query"])

    @property
    def n_key(self) -> int:
        """Key positions."""
        return int(self.about["n_key"])

    def labels(self, axis: str) -> list[str]:
        """Text of each position of an axis, `query` or `key`."""
        kept = self.about.get(f"{axis}_labels")
        if kept is not None:
            return list(kept)
        n = self.n_query if axis == "query" else self.n_key
        tokens = self.trace.tokens
        return tokens if len(tokens) == n else [str(i) for i in range(n)]

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments that the positions are parted into."""
        return tuple(self.about["segments"])

    @cached_property
    def layers(self) -> "dict[int, LayerTrace]":
        """Layers by index."""
        return {
            int(index): LayerTrace(self, int(index), about)
            for index, about in self.about["layers"].items()
        }


@dataclass(frozen=True)
class LayerTrace:
    """What a trace keeps of one layer.

    Attributes:
        tower: its tower.
        index: layer of the tower.
        about: its entry in `trace.json`: form, error at capture, …
    """

    tower: TowerTrace
    index: int
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its file. Only the name is taken from `trace.json`."""
        return self.tower.trace.folder / Path(str(self.about["file"])).name

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return int(self.about["heads"])

    @property
    def form(self) -> str:
        """`exact`, `rows` or `top`."""
        return str(self.about["form"])

    @property
    def error(self) -> float | None:
        """Largest difference from the model's own rows, over the rows compared at capture."""
        found = self.about.get("error")
        return None if found is None else float(found)

    @property
    def note(self) -> str:
        """Why it is not kept as `exact`; empty if it is."""
        return str(self.about.get("note") or "")

    def array(self, name: str, *at: int | slice) -> np.ndarray:
        """One array of the layer's file, or a part of it; only that part is read.

        Raises:
            RunError: there is no such array, or the file is damaged.
        """
        return read_part(self.path, name, *at)

    @cached_property
    def _span(self) -> tuple[np.ndarray, np.ndarray]:
        return self.array("low"), self.array("high")

    def names(self) -> tuple[str, ...]:
        """Arrays that were kept."""
        return tuple(self.about["arrays"])


@dataclass(frozen=True)
class HeadTrace:
    """One head of a trace.

    Attributes:
        layer: its layer.
        head: query head of the layer.
    """

    layer: LayerTrace
    head: int

    @property
    def n_query(self) -> int:
        """Query positions."""
        return self.layer.tower.n_query

    @property
    def n_key(self) -> int:
        """Key positions."""
        return self.layer.tower.n_key

    @property
    def kv(self) -> int:
        """Its key-value group."""
        return self.head // (self.layer.n_heads // int(self.layer.about["kv_heads"]))

    def summary(self, name: str) -> np.ndarray:
        """One of the summaries of this head: `entropy`, `distance`, `received`, `segments`, ….

        Raises:
            RunError: it was not kept.
        """
        return self.layer.array(name, self.head)

    def rows(self, queries: np.ndarray | list[int]) -> Float[np.ndarray, "row key"]:
        """Whole rows of the map; NaN where a query does not see a key.

        Raises:
            InputError: a query is outside the prompt.
        """
        at = self._checked(queries, self.n_query, "query")
        if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
            log, seen = self._log(slice(int(at[0]), int(at[-1]) + 1), slice(0, self.n_key))
        else:
            parts = [self._log(slice(i, i + 1), slice(0, self.n_key)) for i in at.tolist()]
            log, seen = (np.concatenate(x) for x in zip(*parts, strict=True))
        return np.where(seen, np.exp(log), np.float32(np.nan))

    def columns(self, keys: np.ndarray | list[int]) -> Float[np.ndarray, "key query"]:
        """Whole columns of the map: what every query gives to a key; NaN where it is not seen.

        Raises:
            InputError: a key is outside the prompt.
        """
        at = self._checked(keys, self.n_key, "key")
        parts = [self._log(slice(0, self.n_query), slice(j, j + 1)) for j in at.tolist()]
        return np.stack([np.where(seen, np.exp(log), np.nan)[:, 0] for log, seen in parts])

    def block(self, q: tuple[int, int], k: tuple[int, int]) -> Float[np.ndarray, "query key"]:
        """Every entry of a window of the map; NaN where a query does not see a key.

        Raises:
            InputError: the window is empty or outside the prompt.
        """
        self._check(q, k)
        log, seen = self._log(slice(*q), slice(*k))
        return np.where(seen, np.exp(log), np.float32(np.nan))

    def window(self, q: tuple[int, int], k: tuple[int, int], *, cells: int = CELLS) -> Window:
        """A window of the map, as at most `cells` cells a side.

        Args:
            q: first query and the one after the last.
            k: first key and the one after the last.
            cells: most cells a side.

        Raises:
            InputError: the window is empty or outside the prompt.
        """
        self._check(q, k)
        q0, q1, pool_q = aligned(*q, self.n_query, cells)
        k0, k1, pool_k = aligned(*k, self.n_key, cells)
        kept = self._level(pool_q, pool_k, max(q1 - q0, k1 - k0))
        if kept is not None:
            return self._pooled_level(kept, q, k, cells)
        log, seen = self._log(slice(q0, q1), slice(k0, k1))
        # exp grows with its argument: pooled first, it is taken of few entries.
        log = pooled(np.where(seen, log, -np.inf), pool_q, pool_k)
        return Window(encode(np.exp(log), log > -np.inf), q0, k0, q1, k1, pool_q, pool_k)

    def overview(self) -> Window:
        """The whole map, as it was pooled at capture."""
        codes = self.layer.array("overview", self.head)
        p_q, p_k = (int(x) for x in self.layer.about["overview"])
        return Window(codes, 0, 0, self.n_query, self.n_key, p_q, p_k)

    def _level(self, pool_q: int, pool_k: int, width: int) -> str | None:
        """The coarsest level that was kept and still resolves a window."""
        for name in ("overview", "middle"):
            if name in self.layer.about:
                p_q, p_k = (int(x) for x in self.layer.about[name])
                fine = p_q <= pool_q and p_k <= pool_k
                if fine or (width > LARGEST and name == "middle"):
                    return name
        return None

    def _pooled_level(
        self, name: str, q: tuple[int, int], k: tuple[int, int], cells: int
    ) -> Window:
        p_q, p_k = (int(x) for x in self.layer.about[name])
        codes = self.layer.array(name, self.head)
        q0, q1, more_q = aligned(q[0] // p_q, -(-q[1] // p_q), codes.shape[0], cells)
        k0, k1, more_k = aligned(k[0] // p_k, -(-k[1] // p_k), codes.shape[1], cells)
        part = pooled(codes[q0:q1, k0:k1], more_q, more_k)
        return Window(
            part, q0 * p_q, k0 * p_k, min(q1 * p_q, self.n_query), min(k1 * p_k, self.n_key),
            p_q * more_q, p_k * more_k,
        )  # fmt: skip

    def _log(self, q: slice, k: slice) -> tuple[np.ndarray, np.ndarray]:
        """Logarithm of a window's entries, and which of them are seen."""
        layer = self.layer
        low, high = layer._span
        places = np.arange(k.start, k.stop, dtype=np.int32)
        seen = (places >= low[q, None]) & (places < high[q, None])
        if layer.form == ROWS:
            with np.errstate(divide="ignore"):
                return np.log(layer.array("pattern", self.head, q, k).astype(np.float32)), seen
        if layer.form == TOP:
            return self._sparse(q, k), seen
        queries = layer.array("q", self.head, q).astype(np.float32)
        keys = layer.array("k", self.kv, k).astype(np.float32)
        s = queries @ (keys.T * np.float32(layer.about["scale"]))
        cap = layer.about.get("softcap")
        if cap is not None:
            s = np.tanh(s / np.float32(cap)) * np.float32(cap)
        if "bias_key" in layer.names():
            s += layer.array("bias_key", self.head, k)
        if "bias_offset" in layer.names():
            # Entry j − i + n_query − 1 belongs to the pair (i, j).
            first = k.start - (q.stop - 1) + self.n_query - 1
            bias = layer.array("bias_offset", self.head, slice(first, first + sum(s.shape) - 1))
            s += np.lib.stride_tricks.sliding_window_view(bias, s.shape[1])[::-1]
        s -= layer.array("lse", self.head, q)[:, None]
        return np.minimum(s, np.float32(0.0), out=s), seen

    def _sparse(self, q: slice, k: slice) -> np.ndarray:
        at = self.layer.array("top_key", self.head, q)
        mass = self.layer.array("top_mass", self.head, q).astype(np.float32)
        dense = np.zeros((q.stop - q.start, self.n_key), np.float32)
        np.put_along_axis(dense, at.astype(np.int64), mass, axis=1)
        with np.errstate(divide="ignore"):
            return np.log(dense[:, k])

    def _check(self, q: tuple[int, int], k: tuple[int, int]) -> None:
        for name, (start, stop), n in (("queries", q, self.n_query), ("keys", k, self.n_key)):
            if not 0 <= start < stop <= n:
                raise InputError(f"{name} of a window must lie within 0..{n}; got {start}:{stop}")

    def _checked(self, places: np.ndarray | list[int], n: int, name: str) -> np.ndarray:
        at = np.asarray(places, dtype=np.int64)
        if at.ndim != 1 or not len(at) or at.min() < 0 or at.max() >= n:
            raise InputError(f"each {name} must lie in 0..{n - 1}; got {places}")
        return at
