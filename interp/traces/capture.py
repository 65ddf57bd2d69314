"""Capturing a trace: one forward pass, one file a layer, checked against the model's own rows.

Queries and keys are kept in half precision, and the log-sum-exp is that of the *kept* numbers, so
that rows sum to one whatever was rounded. `CHECKED` random rows of every head are then compared
with the model's own; a layer that differs by more than `TOLERANCE` is kept in single precision,
and if that does not help, by its rows. What a page shows at once is summed up on the way, in the
same blocks of rows: nothing of size T×T is ever held, unless the model itself holds it.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import SiteError
from interp.files import disk_errors, remove_temporaries, write_json, write_table
from interp.prompts import Prompt
from interp.seam.calls import AttnCall
from interp.traces.rules import Rule, joined
from interp.traces.summary import Summary, partition
from interp.traces.trace import EXACT, FOLDER, INFO, PICTURES, ROWS, SCHEMA, TOP, VERSION, Trace

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer, Tower

CHECKED = 8
"""Rows of each head that are compared with the model's own."""
TOLERANCE = 1e-3
"""Largest difference of an entry up to which a layer counts as reconstructed."""
WHOLE = 1024
"""Prompt length up to which the rows of other layers are kept whole."""
LARGEST = 64
"""Entries of each row that are kept beyond that."""
BLOCK = 256

Progress = Callable[[int, int], None]
"""Called with layers done and layers in all."""


def trace_key(prompt: Prompt, about: Mapping[str, Any]) -> str:
    """Name of a trace: a hash of the prompt and of whatever else its numbers depend on."""
    inputs = {n: hashlib.sha256(_raw(x)).hexdigest() for n, x in sorted(prompt.inputs.items())}
    spans = {n: [list(r) for r in ranges] for n, ranges in sorted(prompt.spans.items())}
    text = json.dumps([prompt.id, prompt.tokens, spans, inputs, dict(about)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _raw(x: Any) -> bytes:
    return bytes(torch.as_tensor(x).detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@torch.no_grad()
def capture(
    model: "Model",
    prompt: Prompt,
    run_folder: str | Path,
    *,
    text: str = "",
    towers: Collection[str] | None = None,
    layers: Collection[int] | None = None,
    pictures: Mapping[str, np.ndarray] | None = None,
    picture_facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run the model once on a prompt and keep its attention in a run's folder.

    A trace that is there already is opened, not made again; one that a kill left unfinished is
    made anew.

    Args:
        model: the model in hand.
        prompt: the prompt, with spans.
        run_folder: folder of the run; the trace goes to `traces/KEY`.
        text: the prompt as a person wrote it.
        towers: towers to keep; all if None.
        layers: layers to keep of each; all if None.
        pictures: images and patches, by the names of `interp.traces.trace`.
        picture_facts: header of the pictures.
        progress: called after each layer.

    Raises:
        SiteError: no layer that was asked for was reached.
        RunError: the disk is full or not ours to write.
    """
    wanted = {"towers": sorted(towers or ()), "layers": sorted(layers or ())}
    key = trace_key(prompt, {"fingerprint": model.fingerprint, "dtype": str(model.dtype), **wanted})
    folder = Path(run_folder) / FOLDER / key
    if (folder / INFO).exists():
        return Trace(folder)
    with disk_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    batch = model.batch([prompt])
    writer = _Writer(model, prompt, folder, towers, layers, progress)
    with model.observe(writer):
        model.forward(_inputs(model, batch.inputs()))
    kept = writer.finish()
    if pictures:
        write_table(folder / PICTURES, dict(pictures), picture_facts or {})
    write_json(
        folder / INFO,
        {
            "schema": SCHEMA, "version": VERSION, "id": prompt.id or key, "text": text,
            "model": model.name, "fingerprint": model.fingerprint, "dtype": str(model.dtype),
            "tokens": words(model, prompt.tokens), "ids": list(prompt.tokens),
            "spans": {n: [list(r) for r in ranges] for n, ranges in prompt.spans.items()},
            "answer": words(model, prompt.answer or ()), "towers": kept,
        },
    )  # fmt: skip
    return Trace(folder)


def words(model: "Model", tokens: Sequence[int]) -> list[str]:
    """Text of each token by itself; its number where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(t) for t in tokens]
    out = []
    for t in tokens:
        word = model.tokenizer.decode([t], clean_up_tokenization_spaces=False)
        if "\ufffd" in word or not word:  # a part of a character, or a token that is never shown
            word = str(model.tokenizer.convert_ids_to_tokens(int(t)))
        else:
            raw = str(model.tokenizer.convert_ids_to_tokens(int(t)))
            # Sentencepiece decoders drop the space before the first word.
            if raw.startswith("\u2581") and not word.startswith(" "):
                word = f" {word}"
        out.append(word)
    return out


def _inputs(model: "Model", inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if model.reads_tokens:
        return dict(inputs)
    return {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}


@dataclass
class _Held:
    """Calls of a layer that are not yet all there."""

    calls: list[AttnCall] = field(default_factory=list)
    at: int = 0


class _Writer:
    """An observer that writes each layer as soon as it has been called."""

    def __init__(
        self,
        model: "Model",
        prompt: Prompt,
        folder: Path,
        towers: Collection[str] | None,
        layers: Collection[int] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.prompt, self.folder, self.progress = model, prompt, folder, progress
        chosen = {n: t for n, t in model.towers.items() if towers is None or n in towers}
        self.towers: dict[str, Tower] = chosen
        self.layers: dict[str, tuple[Tower, Layer]] = {
            layer.name: (tower, layer)
            for tower in chosen.values()
            for layer in tower.layers
            if layers is None or layer.index in layers
        }
        if not self.layers:
            raise SiteError(f"a trace needs a layer of {model.name}; none that was named is there")
        self.held: dict[str, _Held] = {}
        self.kept: dict[str, dict[str, Any]] = {}
        self.done = 0

    def __call__(self, call: AttnCall) -> None:
        """Keep a call; write its layer once every position is there."""
        if call.name not in self.layers:
            return
        tower, layer = self.layers[call.name]
        held = self.held.setdefault(call.name, _Held())
        expected = self._expected(tower.name)
        held.at += call.n_query * call.z.shape[0]
        if expected is None or held.at < expected:
            # The model may write the next call over these tensors.
            held.calls.append(_copied(call))
            return
        held.calls.append(call)
        self._write(tower, layer, held.calls)
        held.calls = []

    def finish(self) -> dict[str, Any]:
        """Write what is left, and say what was kept."""
        for name, held in self.held.items():
            if held.calls:
                self._write(*self.layers[name], held.calls)
        if not self.kept:
            raise SiteError(f"the forward pass of {self.model.name} reached no layer of the trace")
        return self.kept

    def _rows(self, tower: str) -> "Sequence[Prompt] | None":
        """The prompt as a tower sees it; None where that is not known."""
        if tower in self.prompt.views:
            return self.prompt.views[tower]
        return None if tower.startswith("vision") else (self.prompt,)

    def _expected(self, tower: str) -> int | None:
        rows = self._rows(tower)
        return None if rows is None else sum(map(len, rows))

    def _write(self, tower: "Tower", layer: "Layer", calls: list[AttnCall]) -> None:
        rows = self._rows(tower.name)
        n_query = sum(c.n_query * c.z.shape[0] for c in calls)
        n_key = sum(c.n_key * c.z.shape[0] for c in calls)
        entry = self.kept.setdefault(tower.name, self._entry(tower.name, rows, n_query, n_key))
        if (entry["n_query"], entry["n_key"]) != (n_query, n_key):
            return  # a layer in other positions than the tower's first, as in hierarchical towers
        arrays, about = self._layer(layer, calls, entry)
        name = f"{tower.name}-{layer.index}.safetensors"
        write_table(self.folder / name, arrays, about)
        entry["layers"][str(layer.index)] = about | {"file": name, "arrays": sorted(arrays)}
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, len(self.layers))

    def _entry(
        self, tower: str, rows: "Sequence[Prompt] | None", n_query: int, n_key: int
    ) -> dict[str, Any]:
        """What is the same for all layers of a tower."""
        entry: dict[str, Any] = {"n_query": n_query, "n_key": n_key, "layers": {}}
        if rows is not None and tower in self.prompt.views:
            labels = [word for row in rows for word in _labels(row)]
            for axis, n in (("query", n_query), ("key", n_key)):
                if len(labels) == n:
                    entry[f"{axis}_labels"] = labels
        named = rows[0] if rows is not None and len(rows) == 1 else None
        names, of = partition(named, n_query, n_key)
        entry |= {"segments": names, "query_segments": of[0], "key_segments": of[1]}
        return entry

    def _layer(
        self, layer: "Layer", calls: list[AttnCall], entry: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        found = joined(calls)
        about: dict[str, Any] = {
            "heads": layer.n_heads, "kv_heads": layer.n_kv_heads, "name": layer.name,
            "sinks": layer.sinks,
        }  # fmt: skip
        note = found if isinstance(found, str) else ""
        if not isinstance(found, str):
            q, k, v, rule = found
            for dtype in (torch.float16, torch.float32):
                kept_q, kept_k = (x.float().to(dtype) for x in (q, k))
                if not (kept_q.isfinite().all() and kept_k.isfinite().all()):
                    continue
                summary = Summary(entry, layer.n_heads)
                lse = _swept(kept_q, kept_k, rule, summary)
                error = _compared(calls, kept_q, kept_k, lse, rule)
                if error <= TOLERANCE:
                    arrays = {"q": _np(kept_q), "k": _np(kept_k), "lse": _np(lse)}
                    arrays |= _rule_arrays(rule) | summary.arrays()
                    arrays |= self._values(layer, v)
                    about |= {
                        "form": EXACT, "error": error, "scale": rule.scale,
                        "softcap": rule.softcap, "precision": str(dtype).removeprefix("torch."),
                        **summary.about(),
                    }  # fmt: skip
                    return arrays, about
            note = f"recomputed rows differ from the model's own by {error:.1e}"
        arrays, more = _by_rows(calls, entry, layer.n_heads)
        return arrays, about | more | {"note": note}

    def _values(self, layer: "Layer", v: Tensor) -> dict[str, np.ndarray]:
        """[head, key] norm of what a head writes for each key: ‖v_j W_O‖."""
        try:
            w = self.model.w_o(layer).float()
        except (SiteError, AttributeError, RuntimeError):
            return {}
        group = layer.n_heads // v.shape[0]
        if w.shape[1] != v.shape[-1]:
            return {}
        out = torch.stack([(v[h // group].float() @ w[h]).norm(dim=-1) for h in range(len(w))])
        return {"value_norm": _np(out)}


def _copied(call: AttnCall) -> AttnCall:
    from dataclasses import replace

    parts = {
        n: None if x is None else x.clone()
        for n, x in (("q", call.q), ("k", call.k), ("v", call.v), ("pattern", call.pattern))
    }
    return replace(call, **parts)


def _labels(row: Prompt) -> list[str]:
    """What each position of a row of a vision tower stands for."""
    out = ["·"] * len(row)
    for name, ranges in row.spans.items():
        for start, stop in ranges:
            if stop - start <= 8 and name not in ("all", "image"):
                out[start:stop] = [name] * (stop - start)
    for patch in row.patches or ():
        where = "" if patch.tile is None else f"tile {patch.tile} "
        out[patch.position] = f"{where}{patch.row},{patch.column}"
    return out


def _np(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _rule_arrays(rule: Rule) -> dict[str, np.ndarray]:
    arrays = {"low": _np(rule.low), "high": _np(rule.high)}
    for name in ("bias_key", "bias_offset"):
        value = getattr(rule, name)
        if value is not None:
            arrays[name] = _np(value.float())
    return arrays


def _swept(q: Tensor, k: Tensor, rule: Rule, summary: Summary) -> Tensor:
    """Log-sum-exp of every row [head, query], and on the way what is summed up."""
    n_heads, n_query = q.shape[:2]
    group = n_heads // k.shape[0]
    lse = q.new_zeros(n_heads, n_query, dtype=torch.float32)
    for kv in range(k.shape[0]):
        heads = slice(kv * group, (kv + 1) * group)
        part = rule.of(heads)
        keys = k[kv].float()[None]
        for at in range(0, n_query, summary.step(BLOCK)):
            stop = min(at + summary.step(BLOCK), n_query)
            for h in range(heads.start, heads.stop):
                one = part.of(slice(h - heads.start, h - heads.start + 1))
                s, _ = one.scores(q[h : h + 1, at:stop].float(), keys, at)
                lse[h, at:stop] = rule.lse(s, slice(h, h + 1))[0]
                p = s.sub_(lse[h, at:stop, None]).exp_()[0]
                summary.add(h, at, p, rule.low[at:stop], rule.high[at:stop])
    return lse


def _compared(calls: list[AttnCall], q: Tensor, k: Tensor, lse: Tensor, rule: Rule) -> float:
    """Largest difference of recomputed rows from the model's own."""
    n_heads, n_query = q.shape[:2]
    group = n_heads // k.shape[0]
    chosen = np.random.default_rng(0).choice(n_query, min(CHECKED, n_query), replace=False)
    worst, at, first = 0.0, 0, 0
    for call in calls:
        for b in range(call.z.shape[0]):
            here = torch.tensor(
                sorted(int(i) - at for i in chosen if at <= i < at + call.n_query),
                dtype=torch.long, device=q.device,
            )  # fmt: skip
            if len(here):
                keys = slice(first, first + call.n_key)
                for h in range(n_heads):
                    want = call.rows(b, slice(h, h + 1), here)[0].float()
                    one = rule.of(slice(h, h + 1))
                    for n, i in enumerate((here + at).tolist()):
                        row, key = q[h : h + 1, i : i + 1].float(), k[h // group][None].float()
                        s, _ = one.scores(row, key, i)
                        got = (s[0, 0] - lse[h, i]).exp()[keys]
                        worst = max(worst, float((got - want[n]).abs().max()))
            at, first = at + call.n_query, first + call.n_key
    return worst


def _by_rows(
    calls: list[AttnCall], entry: Mapping[str, Any], n_heads: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A layer kept by its rows: whole, or the largest entries of each."""
    n_query, n_key = int(entry["n_query"]), int(entry["n_key"])
    summary = Summary(entry, n_heads)
    whole = max(n_query, n_key) <= WHOLE
    arrays: dict[str, np.ndarray]
    if whole:
        arrays = {"pattern": np.zeros((n_heads, n_query, n_key), np.float16)}
    else:
        kept = min(LARGEST, n_key)
        arrays = {
            "top_key": np.zeros((n_heads, n_query, kept), np.int32),
            "top_mass": np.zeros((n_heads, n_query, kept), np.float16),
        }
    low, high = np.zeros(n_query, np.int32), np.full(n_query, n_key, np.int32)
    at = first = 0
    for call in calls:
        for b in range(call.z.shape[0]):
            own = slice(first, first + call.n_key)
            low[at : at + call.n_query], high[at : at + call.n_query] = own.start, own.stop
            if call.causal:
                high[at : at + call.n_query] = first + 1 + np.arange(call.n_query)
            step = summary.step(BLOCK)
            # Blocks fall on the cells of the summary, wherever the row begins.
            for start in range(at // step * step, at + call.n_query, step):
                i, j = max(start, at), min(start + step, at + call.n_query)
                for h in range(n_heads):
                    rows = call.rows(b, slice(h, h + 1), slice(i - at, j - at))[0].float()
                    p = rows.new_zeros(j - i, n_key)
                    p[:, own] = rows
                    spans = (torch.as_tensor(x[i:j], device=p.device) for x in (low, high))
                    summary.add(h, i, p, *spans)
                    if whole:
                        arrays["pattern"][h, i:j] = _np(p)
                    else:
                        mass, key = p.topk(arrays["top_key"].shape[-1])
                        arrays["top_key"][h, i:j] = _np(key)
                        arrays["top_mass"][h, i:j] = _np(mass)
            at, first = at + call.n_query, first + call.n_key
    arrays |= {"low": low, "high": high} | summary.arrays()
    return arrays, {"form": ROWS if whole else TOP, "error": None, **summary.about()}
