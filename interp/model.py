"""A handle on the user's model: its towers, its attention calls, its output projections.

The model stays as it is: nothing is rewritten, wrapped or switched, and after every context
manager closes it is as it was. What is read is proven on the model itself by `doctor`.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.errors import HeadIdError, InputError, SiteError
from interp.headid import HeadId
from interp.prompts import Batch, Prompt
from interp.seam.calls import InputEditor, Observer, WeightEditor
from interp.seam.functions import watched
from interp.seam.interface import observed
from interp.seam.kernel import Columns
from interp.seam.structure import Layer, Structure, Tower, probe

if TYPE_CHECKING:
    from interp.doctor import Report
    from interp.zoo import Truth

OutputObserver = Callable[[Layer, Tensor], Tensor | None]
"""Called with a layer and o_in [batch, pos, head, d_v]; may return a replacement."""


class Model:
    """A Hugging Face model with, where known, its tokenizer and processor.

    Make one with `interp.load`.

    Attributes:
        hf: the user's own model object.
        tokenizer: its tokenizer, or None.
        processor: its processor, or None.
        name: how reports call it.
        truth: what is known of a zoo model, or None.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        *,
        name: str,
        example: Mapping[str, Tensor] | None = None,
        truth: "Truth | None" = None,
    ) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.truth = truth
        self._example = example
        self._checked = False

    def __repr__(self) -> str:
        towers = ", ".join(
            f"{t.name} {t.n_layers} layers x {t.n_heads} heads" for t in self.towers.values()
        )
        return f"Model({self.name!r}: {towers})"

    @property
    def config(self) -> Any:
        """The model's own configuration, or None."""
        return getattr(self.hf, "config", None)

    @property
    def text_config(self) -> Any:
        """The configuration of the text decoder."""
        get = getattr(self.config, "get_text_config", None)
        return get() if get else self.config

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next(self.hf.parameters()).dtype

    @property
    def context(self) -> int | None:
        """Most positions the model was made for, or None if it does not say."""
        value = getattr(self.text_config, "max_position_embeddings", None)
        return int(value) if isinstance(value, int) and value > 0 else None

    @property
    def reads_tokens(self) -> bool:
        """Whether its main input is tokens; a plain vision transformer reads images alone."""
        if getattr(self.hf, "main_input_name", "input_ids") == "input_ids":
            return True
        return "input_ids" in inspect.signature(self.hf.forward).parameters

    @property
    def vocabulary(self) -> int:
        """Number of token ids.

        Raises:
            InputError: the model reads images alone.
        """
        if not self.reads_tokens:
            raise InputError(
                f"this needs a model that reads tokens; {self.name} reads images alone",
                hint="choose a task or prompts with images",
            )
        return int(self.text_config.vocab_size)

    @property
    def bos_id(self) -> int | None:
        """The id a text begins with, or None if this tokenizer begins with none."""
        if self.tokenizer is not None:
            ids = self.tokenizer("").input_ids
            bos = self.tokenizer.bos_token_id
            return int(bos) if bos is not None and ids and ids[0] == bos else None
        bos = getattr(self.text_config, "bos_token_id", None)
        return int(bos) if isinstance(bos, int) and bos < self.vocabulary else None

    @property
    def pad_id(self) -> int:
        """The id used for padding; it is masked, so any id serves."""
        for source in (self.tokenizer, self.text_config):
            for name in ("pad_token_id", "eos_token_id"):
                value = getattr(source, name, None)
                if isinstance(value, int) and 0 <= value < self.vocabulary:
                    return value
        return 0

    @property
    def fingerprint(self) -> str:
        """Hash of the configuration and of samples of every weight, for provenance."""
        digest = hashlib.sha256()
        digest.update(type(self.hf).__name__.encode())
        for name, value in sorted(self.hf.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.reshape(-1)
            step = max(1, flat.numel() // 64)
            digest.update(str(flat[::step][:64].float().tolist()).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def structure(self) -> Structure:
        """Towers and layers, found by one forward of a few tokens."""
        from interp.example import example_inputs

        inputs = self._example if self._example is not None else example_inputs(self.hf)
        return probe(self.hf, inputs)

    @property
    def towers(self) -> Mapping[str, Tower]:
        """Attention towers by name; the text decoder comes first."""
        return self.structure.towers

    def tower(self, name: str) -> Tower:
        """One tower.

        Raises:
            SiteError: the model has no such tower.
        """
        if name not in self.towers:
            raise SiteError(f"{self.name} has no tower {name!r}; it has: {', '.join(self.towers)}")
        return self.towers[name]

    def layer_of(self, head: HeadId | str) -> Layer:
        """The layer a head belongs to.

        Raises:
            HeadIdError: the id cannot be read or lies outside the model.
        """
        head = HeadId.parse(head) if isinstance(head, str) else head
        tower = self.towers.get(head.tower)
        if tower is not None:
            for layer in tower.layers:
                if layer.index == head.layer and head.head < layer.n_heads:
                    return layer
        shape = ", ".join(
            f"{t.name} {t.n_layers} layers x {t.n_heads} heads (to {t.heads[-1]})"
            for t in self.towers.values()
        )
        raise HeadIdError(f"{head} is outside this model: {self.name} has {shape}")

    @contextmanager
    def observe(
        self,
        observer: Observer,
        *,
        columns: Columns | None = None,
        inputs: InputEditor | None = None,
        weights: WeightEditor | None = None,
    ) -> Iterator[None]:
        """Show every attention call to `observer` while the context is open.

        Args:
            observer: sees an `AttnCall`; may return a z that replaces the model's.
            columns: columns to append to v in the model's own kernel, where it is reached.
            inputs: may replace q, k and v before the kernel runs.
            weights: may replace the pattern of layers that compute it by softmax.
        """
        layers = self.structure.layers
        names = {m: n for n, m in self.hf.named_modules()}
        rest = [layer for layer in layers.values() if layer.reached == "functions"]
        with ExitStack() as stack:
            if len(rest) < len(layers):
                known = {m: n for m, n in names.items() if n in layers}
                stack.enter_context(observed(known, observer, columns=columns, inputs=inputs))
            if rest:
                stack.enter_context(
                    watched(
                        {self.hf.get_submodule(x.name): x.name for x in rest},
                        {x.name: self.hf.get_submodule(x.projection) for x in rest},
                        {x.name: x.n_heads for x in rest},
                        observer,
                        columns=columns,
                        inputs=inputs,
                        weights=weights,
                    )
                )
            yield

    @contextmanager
    def observe_output(self, observer: OutputObserver) -> Iterator[None]:
        """Show the input of every output projection (`o_in`) while the context is open.

        Args:
            observer: called as observer(layer, o_in [batch, pos, head, d_v]); may return a
                replacement of the same shape, or None.
        """

        def hook(layer: Layer) -> Any:
            def pre(module: nn.Module, args: tuple[Any, ...]) -> Any:
                site = args[0].reshape(*args[0].shape[:-1], layer.n_heads, -1)
                new = observer(layer, site)
                return None if new is None else (new.reshape(args[0].shape), *args[1:])

            return pre

        with ExitStack() as stack:
            for layer in self.structure.layers.values():
                module = self.hf.get_submodule(layer.projection)
                stack.callback(module.register_forward_pre_hook(hook(layer)).remove)
            yield

    def w_o(self, layer: Layer) -> Float[Tensor, "head d_head d_model"]:
        """The output projection of a layer, one matrix per query head."""
        module = self.hf.get_submodule(layer.projection)
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise SiteError(f"{layer.projection} has no readable weight")
        # transformers' Conv1D stores [in, out], nn.Linear [out, in].
        weight = weight if type(module).__name__ == "Conv1D" else weight.T
        return weight.reshape(layer.n_heads, -1, weight.shape[-1])

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """The model's own output on keyword inputs, without gradients.

        Prompts padded on the left get the positions they have alone, as `generate` gives them: many
        a forward counts padding as positions.
        """
        return self.hf(**self.placed(inputs))

    def placed(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with positions that leave out padding on the left, where the model counts."""
        mask = inputs.get("attention_mask")
        if mask is None or mask.dim() != 2 or "past_key_values" in inputs or bool(mask[:, 0].all()):
            return inputs
        if "position_ids" in inputs or not self._counts_positions:
            return inputs
        # From the first token on, whatever is masked after it stays in its place.
        first = mask.to(torch.uint8).argmax(1, keepdim=True)
        place = torch.arange(mask.shape[1], device=mask.device)[None] - first
        return {**inputs, "position_ids": place.clamp(min=0)}

    @cached_property
    def _counts_positions(self) -> bool:
        """Whether `generate` gives the forward one position a token."""
        generates = getattr(self.hf, "can_generate", None)
        if generates is None or not generates():
            return False
        if getattr(self.config, "is_encoder_decoder", False):
            return False
        rope = getattr(self.text_config, "rope_parameters", None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            return False  # three positions a token, which the model finds by itself
        return "position_ids" in inspect.signature(self.hf.forward).parameters

    def encode(self, text: str, *, id: str = "") -> Prompt:
        """Tokenise a text as the model's users do, special tokens included.

        Raises:
            InputError: the model has no tokenizer, or the text is empty.
        """
        if self.tokenizer is None:
            raise InputError(
                f"text needs a tokenizer and {self.name} has none",
                hint="pass tokenizer=... to interp.load, or prompts of token ids",
            )
        ids = self.tokenizer(text).input_ids
        bos = {"bos": ((0, 1),)} if ids and ids[0] == self.bos_id else {}
        return Prompt(tuple(ids), spans=bos, id=id)

    def batch(self, prompts: list[Prompt], *, side: str = "right") -> Batch:
        """Prompts as one padded batch on the model's device.

        Raises:
            InputError: a prompt is longer than the model's context, or has unknown ids.
        """
        for prompt in prompts if self.reads_tokens else ():
            if self.context is not None and len(prompt) > self.context:
                raise InputError(
                    f"a prompt must fit the {self.context} positions of {self.name}; prompt "
                    f"{prompt.id or '?'} has {len(prompt)} tokens",
                    hint="shorten it, or give the task a smaller length",
                )
            wrong = next((t for t in prompt.tokens if not 0 <= t < self.vocabulary), None)
            if wrong is not None:
                raise InputError(
                    f"token ids must lie in 0..{self.vocabulary - 1} for {self.name}; prompt "
                    f"{prompt.id or '?'} has {wrong}"
                )
        pad = self.pad_id if self.reads_tokens else 0
        return Batch.of(prompts, pad_id=pad, side=side, device=str(self.device))

    def doctor(
        self, inputs: Mapping[str, Tensor] | None = None, *, oracle: bool = False
    ) -> "Report":
        """Prove on this model that what is read is true; see `interp.doctor`."""
        from interp.doctor import examine

        return examine(self, inputs, oracle=oracle)

    def check(self) -> None:
        """Run the doctor once and refuse a model on which an identity fails.

        Raises:
            DoctorError: a check failed; the message names it.
        """
        if not self._checked:
            self.doctor().raise_if_failed()
            self._checked = True
