"""Models, prompts, readings, results, runs, zoo: everything the other packages stand on."""

from typing import TYPE_CHECKING

from interp.lazy import lazy

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

__getattr__ = lazy(__name__, _HOMES)
