"""The models that a server holds: those used last, each as it was when it was loaded."""

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.exits import say
from app.loading import Source

if TYPE_CHECKING:
    from interp.model import Model

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class _Held:
    model: "Model"
    files: tuple[Any, ...]
    state: tuple[Any, ...]


class Models:
    """A cache of models for `app.loading.cached`; for one thread.

    Args:
        most: models that are held; the one not used for longest goes first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Source, _Held] = OrderedDict()

    def get(self, source: Source, load: "Callable[[], Model]") -> "Model":
        """The model of a source, loaded if it is not held or its files have changed."""
        files = _files(source)
        held = self._held.get(source)
        if held is not None and held.files == files:
            self._held.move_to_end(source)
            return held.model
        # Before the next is loaded: there may be no room for both.
        self._held.pop(source, None)
        del held
        while len(self._held) >= self._most:
            self._held.popitem(last=False)
        collect()
        say(f"loading {source.name}")
        model = load()
        self._held[source] = _Held(model, files, state_of(model))
        return model

    def settle(self) -> list[str]:
        """Drop models that are no longer as they were loaded; returns their names."""
        changed = [s for s, held in self._held.items() if state_of(held.model) != held.state]
        for source in changed:
            del self._held[source]
        return [source.name for source in changed]

    def clear(self) -> None:
        """Drop every model."""
        self._held.clear()
        collect()

    def __len__(self) -> int:
        return len(self._held)


def state_of(model: "Model") -> tuple[Any, ...]:
    """What work on a model could leave behind: hooks, replaced methods, modes, changed weights.

    Weights are told by the counter of their changes in place, so that this costs nothing.
    """
    hf = model.hf
    modules = tuple(
        (name, module.training, "forward" in vars(module),
         *(tuple(getattr(module, hooks)) for hooks in _HOOKS))
        for name, module in hf.named_modules()
    )  # fmt: skip
    weights = tuple(
        (name, x.data_ptr(), -1 if x.is_inference() else x._version, x.requires_grad, x.dtype)
        for some in (hf.named_parameters(), hf.named_buffers())
        for name, x in some
    )
    return modules, weights, getattr(model.text_config, "_attn_implementation", None)


def collect() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _files(source: Source) -> tuple[Any, ...]:
    """Sizes and times of the files of a folder, so that another model in it is noticed."""
    folder = Path(source.name)
    if not folder.is_dir():
        return ()
    found = sorted(p for p in folder.iterdir() if p.is_file())
    return tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found)
