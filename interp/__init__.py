"""Models, prompts, readings, results, runs, zoo: everything the other packages stand on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.headid import HeadId as HeadId
    from interp.loading import load as load
    from interp.model import Model as Model
    from interp.prompts import Batch as Batch
    from interp.prompts import Prompt as Prompt
    from interp.prompts import PromptPair as PromptPair
    from interp.run import Run as Run
    from interp.scores import HeadScores as HeadScores

_HOMES = {
    "Batch": "interp.prompts",
    "HeadId": "interp.headid",
    "HeadScores": "interp.scores",
    "Model": "interp.model",
    "Prompt": "interp.prompts",
    "PromptPair": "interp.prompts",
    "Run": "interp.run",
    "load": "interp.loading",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used: `headscope --help` must not wait for torch.
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'interp' has no attribute {name!r}")
