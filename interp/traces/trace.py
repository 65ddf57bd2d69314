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
from interp.traces.calm import one_thread
from interp.traces.pooling import CELLS, Window, aligned, encode, pooled
from interp.traces.recent import Recent

SCHEMA, VERSION = "headscope.trace", 1
FOLDER, INFO, PICTURES = "traces", "trace.json", "pictures.safetensors"
WORDS = "words.json"
EXACT, ROWS, TOP = "exact", "rows", "top"
LARGEST = 4096
"""A window of more entries than a square of this side is answered from a coarser level, if kept."""
_ENTRIES = 1 << 20
_NONE = np.float32(-np.inf)
_RECENT = Recent(128 << 20)
Places = slice | np.ndarray
"""Some positions: a range, or one by one."""


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
        kinds = {"version": int, "tokens": list, "towers": dict, "spans": dict, "id": str}
        for name, kind in kinds.items():
            if not isinstance(self.info.get(name), kind):
                raise RunError(
                    f"{self.folder / INFO} is damaged: {name!r} must be a {kind.__name__}"
                )
        if self.info["version"] > VERSION:
            raise RunError(
                f"{self.folder} is a trace of version {self.info['version']}; this program reads "
                f"version {VERSION}",
                hint="update headscope",
            )

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

    @cached_property
    def words(self) -> Mapping[str, str]:
        """Texts of token ids that `HeadTrace.writes` names; empty in older traces."""
        path = self.folder / WORDS
        return {str(k): str(v) for k, v in read_json(path).items()} if path.exists() else {}

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
class Written:
    """What a head writes when it looks at a key.

    Attributes:
        key: position of the key.
        rank: place of the key's own token among those that are raised; 1 is a copy.
        up: tokens whose logits rise most.
        down: tokens whose logits fall most.
    """

    key: int
    rank: int
    up: tuple[str, ...]
    down: tuple[str, ...]


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

    def part(self, name: str, head: int, at: "Places") -> np.ndarray:
        """Some places of an array [head, place, …], by a range or one by one."""
        if isinstance(at, slice):
            return self.array(name, head, at)
        first = int(at.min())
        some: np.ndarray = self.array(name, head, slice(first, int(at.max()) + 1))[at - first]
        return some

    def keys(self, kv: int, at: "Places") -> Float[np.ndarray, "key d"]:
        """Keys of a key-value group in single precision."""
        few = isinstance(at, slice) and 2 * (at.stop - at.start) < self.tower.n_key
        if few or not isinstance(at, slice):
            return self.part("k", kv, at).astype(np.float32)
        with disk_errors(self.path, "read"):
            # Another trace may lie at this path by now.
            key = str(self.path), self.path.stat().st_mtime_ns, kv
        keys: np.ndarray = _RECENT.get(key, lambda: self.array("k", kv).astype(np.float32))[at]
        return keys

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

    def writes(self) -> "list[Written]":
        """What the head writes for the keys that it likes most; empty where that was not kept."""
        if "write_key" not in self.layer.names():
            return []
        words = self.layer.tower.trace.words
        keys, ranks, up, down = (
            self.layer.array(f"write_{name}", self.head).tolist()
            for name in ("key", "rank", "up", "down")
        )
        return [
            Written(
                key, rank, *(tuple(words.get(str(t), f"#{t}") for t in side) for side in (u, d))
            )
            for key, rank, u, d in zip(keys, ranks, up, down, strict=True)
            if key >= 0
        ]

    def rows(self, queries: np.ndarray | list[int]) -> Float[np.ndarray, "row key"]:
        """Whole rows of the map; NaN where a query does not see a key.

        Raises:
            InputError: a query is outside the prompt.
        """
        log, seen = self._log(self._checked(queries, self.n_query, "query"), self._keys)
        return np.where(seen, np.exp(log), np.float32(np.nan))

    def columns(self, keys: np.ndarray | list[int]) -> Float[np.ndarray, "key query"]:
        """Whole columns of the map: what every query gives to a key; NaN where it is not seen.

        Raises:
            InputError: a key is outside the prompt.
        """
        at = self._checked(keys, self.n_key, "key")
        log, seen = self._log(slice(0, self.n_query), at)
        return np.where(seen, np.exp(log), np.float32(np.nan)).T

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
        kept = self._level(pool_q, pool_k, (q1 - q0) * (k1 - k0))
        if kept is not None:
            return self._pooled_level(kept, q, k, cells)
        step = max(1, _ENTRIES // (k1 - k0) // pool_q) * pool_q
        parts = []
        for at in range(q0, q1, step):
            log, seen = self._log(slice(at, min(at + step, q1)), slice(k0, k1))
            np.copyto(log, np.float32(-np.inf), where=~seen)
            # exp grows with its argument: pooled first, it is taken of few entries.
            log = pooled(log, pool_q, pool_k)
            parts.append(encode(np.exp(log), log > _NONE))
        return Window(np.concatenate(parts), q0, k0, q1, k1, pool_q, pool_k)

    def overview(self) -> Window:
        """The whole map, as it was pooled at capture."""
        codes = self.layer.array("overview", self.head)
        p_q, p_k = (int(x) for x in self.layer.about["overview"])
        return Window(codes, 0, 0, self.n_query, self.n_key, p_q, p_k)

    def _level(self, pool_q: int, pool_k: int, entries: int) -> str | None:
        """The coarsest level that was kept and still resolves a window."""
        for name in ("overview", "middle"):
            if name in self.layer.about:
                p_q, p_k = (int(x) for x in self.layer.about[name])
                fine = p_q <= pool_q and p_k <= pool_k
                if fine or (entries > LARGEST**2 and name == "middle"):
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

    @property
    def _keys(self) -> slice:
        return slice(0, self.n_key)

    def _log(self, q: Places, k: Places) -> tuple[np.ndarray, np.ndarray]:
        """Logarithm of the entries of some queries and keys, and which of them are seen."""
        layer = self.layer
        low, high = layer._span
        keys = np.arange(k.start, k.stop, dtype=np.int32) if isinstance(k, slice) else k
        seen = (keys >= low[q][:, None]) & (keys < high[q][:, None])
        if layer.form != EXACT:
            p = layer.part("pattern", self.head, q)[:, k] if layer.form == ROWS else self._top(q, k)
            with np.errstate(divide="ignore"):
                # A pattern is NaN where a mask that is no rule hides a key.
                return np.log(p.astype(np.float32)), seen & ~np.isnan(p)
        queries = layer.part("q", self.head, q).astype(np.float32)
        queries *= np.float32(layer.about["scale"])
        with one_thread():
            s = queries @ layer.keys(self.kv, k).T
        cap = layer.about.get("softcap")
        if cap is not None:
            s = np.tanh(s / np.float32(cap)) * np.float32(cap)
        if "bias_key" in layer.names():
            s += layer.part("bias_key", self.head, k)
        if "bias_offset" in layer.names():
            s += self._offsets(q, keys)
        s -= layer.part("lse", self.head, q)[:, None]
        return np.minimum(s, np.float32(0.0), out=s), seen

    def _offsets(self, q: Places, keys: np.ndarray) -> np.ndarray:
        """What is added by distance: entry j − i + n_query − 1 belongs to the pair (i, j)."""
        queries = np.arange(q.start, q.stop) if isinstance(q, slice) else q
        bias = self.layer.array("bias_offset", self.head)
        added: np.ndarray = bias[keys[None] - queries[:, None] + self.n_query - 1]
        return added

    def _top(self, q: Places, k: Places) -> np.ndarray:
        at = self.layer.part("top_key", self.head, q).astype(np.int64)
        dense = np.zeros((len(at), self.n_key), np.float32)
        # Entries beyond a row's keys are zero, and must not overwrite others.
        np.maximum.at(
            dense, (np.arange(len(at))[:, None], at), self.layer.part("top_mass", self.head, q)
        )
        return dense[:, k]

    def _check(self, q: tuple[int, int], k: tuple[int, int]) -> None:
        for name, (start, stop), n in (("queries", q, self.n_query), ("keys", k, self.n_key)):
            if not 0 <= start < stop <= n:
                raise InputError(f"{name} of a window must lie within 0..{n}; got {start}:{stop}")

    def _checked(self, places: np.ndarray | list[int], n: int, name: str) -> np.ndarray:
        at = np.asarray(places, dtype=np.int64)
        if at.ndim != 1 or not len(at) or at.min() < 0 or at.max() >= n:
            raise InputError(f"each {name} must lie in 0..{n - 1}; got {places}")
        return at
