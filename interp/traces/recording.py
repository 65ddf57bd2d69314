"""Capturing a trace: one forward pass, one file a layer, checked against the model's own rows.

Queries and keys are kept in half precision, and the log-sum-exp is that of the *kept* numbers, so
that rows sum to one whatever was rounded. `CHECKED` random rows of every head are then compared
with the model's own; a layer that differs by more than `TOLERANCE` is kept in single precision,
and if that does not help, by its rows. What a page shows at once is summed up on the way, in the
same blocks of rows: nothing of size T×T is ever held, unless the model itself holds it.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.errors import SiteError
from interp.files import disk_errors, remove_temporaries, write_json, write_table
from interp.headid import DEFAULT_TOWER
from interp.prompts import Prompt
from interp.seam.calls import AttnCall
from interp.traces.rules import Rule, joined
from interp.traces.summary import Summary, levels, partition
from interp.traces.sweeps import by_rows, compared, swept
from interp.traces.trace import (
    EXACT,
    FOLDER,
    INFO,
    PICTURES,
    ROWS,
    SCHEMA,
    TOP,
    VERSION,
    WORDS,
    Trace,
)
from interp.traces.writes import unembedding_of, written

if TYPE_CHECKING:
    from interp.model import Model
    from interp.seam.structure import Layer, Tower

TOLERANCE = 1e-3
"""Largest difference of an entry up to which a layer counts as reconstructed."""

_TOKENS = (DEFAULT_TOWER, "encoder", "cross")
_Rows = Sequence[Prompt] | None

Progress = Callable[[int, int], None]
"""Called with layers done and layers in all."""


def trace_key(prompt: Prompt, about: Mapping[str, Any]) -> str:
    """Name of a trace: a hash of the prompt and of whatever else its numbers depend on."""
    inputs = {n: hashlib.sha256(_raw(x)).hexdigest() for n, x in sorted(prompt.inputs.items())}
    spans = {n: [list(r) for r in ranges] for n, ranges in sorted(prompt.spans.items())}
    text = json.dumps(
        [prompt.id, prompt.tokens, prompt.answer, spans, inputs, dict(about)], sort_keys=True
    )
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
    inputs, decoder = _inputs(model, prompt)
    writer = _Writer(model, prompt, decoder, folder, towers, layers, progress)
    with model.observe(writer):
        model.forward(inputs)
    kept = writer.finish()
    if writer.named:
        write_json(folder / WORDS, {str(t): w for t, w in _dictionary(model, writer.named).items()})
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
            **({} if decoder is None else {"decoder": words(model, decoder.tokens)}),
        },
    )  # fmt: skip
    return Trace(folder)


def layer_size(layer: "Layer", n: int) -> int:
    """Bytes of a layer's file for a prompt of n positions, if it is kept as `exact`.

    In half precision, without position biases; a file in single precision is at most twice as
    large.
    """
    cells = sum(-(-n // q) * -(-n // k) for q, k in levels(n, n).values())
    per_head = 2 * n * (layer.d_qk or layer.d_v) + cells + 20 * n
    return layer.n_heads * per_head + layer.n_kv_heads * 2 * n * (layer.d_qk or layer.d_v) + 8 * n


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


def _inputs(model: "Model", prompt: Prompt) -> tuple[dict[str, Tensor], Prompt | None]:
    """What the model's forward takes, and what the decoder of an encoder-decoder reads."""
    inputs = model.batch([prompt]).inputs()
    if not model.reads_tokens:
        inputs = {n: x for n, x in inputs.items() if n not in ("input_ids", "attention_mask")}
    known = inspect.signature(model.hf.forward).parameters
    decoder = None
    if getattr(model.config, "is_encoder_decoder", False):
        if "decoder_input_ids" not in inputs:
            start = getattr(model.config, "decoder_start_token_id", None)
            tokens = (model.pad_id if start is None else int(start), *(prompt.answer or ()))
            inputs["decoder_input_ids"] = torch.tensor([tokens], device=model.device)
        decoder = Prompt(tuple(inputs["decoder_input_ids"][0].tolist()))
    elif "logits_to_keep" in known:
        # Those of every position may take more memory than the model.
        inputs["logits_to_keep"] = 1  # type: ignore[assignment]
    return inputs, decoder


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
        decoder: Prompt | None,
        folder: Path,
        towers: Collection[str] | None,
        layers: Collection[int] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.prompt, self.decoder = model, prompt, decoder
        self.folder, self.progress = folder, progress
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
        self.unembedding = unembedding_of(model) if DEFAULT_TOWER in chosen else None
        self.named: set[int] = set()
        self.held: dict[str, _Held] = {}
        self.kept: dict[str, dict[str, Any]] = {}
        self.done = 0

    def __call__(self, call: AttnCall) -> None:
        """Keep a call; write its layer once every position is there."""
        if call.name not in self.layers:
            return
        tower, layer = self.layers[call.name]
        held = self.held.setdefault(call.name, _Held())
        rows = self._axes(tower)[0]
        held.at += call.n_query * call.z.shape[0]
        if rows is None or held.at < sum(map(len, rows)):
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
        kept = {name: entry for name, entry in self.kept.items() if entry["layers"]}
        if not kept:
            why = [w for entry in self.kept.values() for w in entry["left_out"].values()]
            found = why[0] if why else "the forward pass reached none of these layers"
            raise SiteError(f"a trace of {self.model.name} would keep no layer: {found}")
        return kept

    def _axes(self, tower: "Tower") -> tuple[_Rows, _Rows]:
        """The prompt as the queries and as the keys of a tower see it; None if not known."""
        seen = self.prompt.views.get(tower.name)
        own = (self.prompt,) if tower.name in _TOKENS and self.model.reads_tokens else None
        inner = own if self.decoder is None else (self.decoder,)
        if any(layer.cross for layer in tower.layers):
            return inner, (own if self.decoder is not None else None) if seen is None else seen
        rows = seen if seen is not None else inner if tower.name == DEFAULT_TOWER else own
        return rows, rows

    def _write(self, tower: "Tower", layer: "Layer", calls: list[AttnCall]) -> None:
        n_query = sum(c.n_query * c.z.shape[0] for c in calls)
        n_key = sum(c.n_key * c.z.shape[0] for c in calls)
        if tower.name not in self.kept:
            self.kept[tower.name] = self._entry(tower, n_query, n_key)
        entry = self.kept[tower.name]
        self.done += 1
        views = self.prompt.views.get(f"{tower.name}/{layer.index}", ())
        if any(row.patches is not None and row.patches.windows is not None for row in views):
            entry["left_out"][str(layer.index)] = "it attends within windows of its grid"
        elif (entry["n_query"], entry["n_key"]) != (n_query, n_key):
            entry["left_out"][str(layer.index)] = "its positions are not those of the first layer"
        else:
            arrays, about = self._layer(layer, calls, entry)
            name = f"{tower.name}-{layer.index}.safetensors"
            write_table(self.folder / name, arrays, about)
            entry["layers"][str(layer.index)] = about | {"file": name, "arrays": sorted(arrays)}
        if self.progress is not None:
            self.progress(self.done, len(self.layers))

    def _entry(self, tower: "Tower", n_query: int, n_key: int) -> dict[str, Any]:
        """What is the same for all layers of a tower."""
        entry: dict[str, Any] = {"n_query": n_query, "n_key": n_key, "layers": {}, "left_out": {}}
        names: list[str] = []
        for axis, n, rows in zip(
            ("query", "key"), (n_query, n_key), self._axes(tower), strict=True
        ):
            one = rows[0] if rows is not None and len(rows) == 1 else None
            own, of = partition(one, n)
            names += [name for name in own if name not in names]
            entry[f"{axis}_segments"] = [names.index(own[i]) for i in of]
            labels = [word for row in rows or () for word in self._labels(row)]
            if rows is None or one is not self.prompt or len(labels) != n:
                entry[f"{axis}_labels"] = labels if len(labels) == n else [str(i) for i in range(n)]
        return entry | {"segments": names}

    def _labels(self, row: Prompt) -> list[str]:
        if row is self.prompt or row is self.decoder:
            return words(self.model, row.tokens)
        return _patch_labels(row)

    def _layer(
        self, layer: "Layer", calls: list[AttnCall], entry: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        about: dict[str, Any] = {
            "heads": layer.n_heads, "kv_heads": layer.n_kv_heads, "name": layer.name,
            "sinks": layer.sinks,
        }  # fmt: skip
        found = joined(calls)
        if isinstance(found, str):
            note = found
        else:
            q, k, v, rule = found
            note = "its queries or keys are not finite"
            for dtype in (torch.float16, torch.float32):
                kept_q, kept_k = q.to(dtype), k.to(dtype)
                if not (kept_q.isfinite().all() and kept_k.isfinite().all()):
                    continue
                summary = Summary(entry, layer.n_heads)
                lse = swept(kept_q, kept_k, rule, summary)
                error = compared(calls, kept_q, kept_k, lse, rule)
                if error <= _tolerance(calls):
                    arrays = {"q": _np(kept_q), "k": _np(kept_k), "lse": _np(lse)}
                    arrays |= _rule_arrays(rule) | summary.arrays() | self._values(layer, v)
                    arrays |= self._writes(layer, v, summary)
                    about |= {
                        "form": EXACT, "error": error, "scale": rule.scale,
                        "softcap": rule.softcap, "precision": str(dtype).removeprefix("torch."),
                        **summary.about(),
                    }  # fmt: skip
                    return arrays, about
                note = f"recomputed rows differ from the model's own by {error:.1e}"
        summary = Summary(entry, layer.n_heads)
        arrays, whole = by_rows(calls, summary, layer.n_heads)
        about |= {"form": ROWS if whole else TOP, "error": None, "note": note, **summary.about()}
        return arrays | summary.arrays(), about

    def _values(self, layer: "Layer", v: Tensor) -> dict[str, np.ndarray]:
        """[head, key] norm of what a head writes for each key: ‖v_j W_O‖."""
        try:
            w = self.model.w_o(layer).float()
        except (SiteError, AttributeError, RuntimeError):
            return {}
        if w.shape[1] != v.shape[-1]:
            return {}
        group = layer.n_heads // v.shape[0]
        # ‖v W‖ = ‖v Rᵀ‖ with Wᵀ = QR: R is only as large as a head.
        r = torch.linalg.qr(w.transpose(1, 2), mode="r").R
        out = torch.stack([(v[h // group].float() @ r[h].T).norm(dim=-1) for h in range(len(w))])
        return {"value_norm": _np(out)}

    def _writes(self, layer: "Layer", v: Tensor, summary: Summary) -> dict[str, np.ndarray]:
        """What each head of the text decoder writes for the keys that it likes most."""
        if layer.tower != DEFAULT_TOWER or layer.cross:
            return {}
        read = self.prompt if self.decoder is None else self.decoder
        made = written(self.model, layer, v, summary.received, read.tokens, self.unembedding)
        for name in ("write_up", "write_down"):
            self.named.update(made[name].ravel().tolist() if made else ())
        return made


def _dictionary(model: "Model", tokens: Collection[int]) -> dict[int, str]:
    listed = sorted(tokens)
    return dict(zip(listed, words(model, listed), strict=True))


def _tolerance(calls: Sequence[AttnCall]) -> float:
    """What may differ: a model that materialises its pattern in 16 bits has rounded its own."""
    own = (torch.finfo(c.pattern.dtype).eps for c in calls if c.pattern is not None)
    return max(TOLERANCE, *(4 * eps for eps in own), 0.0)


def _copied(call: AttnCall) -> AttnCall:
    def own(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone()

    return replace(call, q=own(call.q), k=own(call.k), v=own(call.v), pattern=own(call.pattern))


def _patch_labels(row: Prompt) -> list[str]:
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
