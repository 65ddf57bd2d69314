"""Continuations with and without a recipe: as a table, or word by word in two columns."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from interp.prompts import Prompt

if TYPE_CHECKING:
    from interp.model import Model
    from interp.recipe import Recipe

SHOWN = 60
"""Characters of the end of a prompt that are shown."""
Show = Callable[[str], None]


def text_of(model: "Model", tokens: Sequence[int]) -> str:
    """Tokens as text, or as ids where the model has no tokenizer."""
    if model.tokenizer is None:
        return " ".join(map(str, tokens))
    return str(model.tokenizer.decode(list(tokens)))


def continued(
    model: "Model", prompts: Sequence[Prompt], recipe: "Recipe | None", *, tokens: int,
    batch_size: int, progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Greedy continuations, under a recipe if one is given."""
    from interp.decode import generate

    out: list[tuple[int, ...]] = []
    for at in range(0, len(prompts), batch_size):
        batch = model.batch(list(prompts[at : at + batch_size]), side="left")
        with recipe.on(model, spans=batch) if recipe is not None else contextlib.nullcontext():
            out += generate(model, batch, max_new_tokens=tokens)
        if progress is not None:
            progress(len(out), len(prompts))
    return out


def rows_of(
    model: "Model", prompts: Sequence[Prompt], plain: Sequence[Sequence[int]],
    steered: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each prompt: its end, both continuations, and the answer."""
    return [
        {
            "id": p.id or str(i), "prompt": ending(model, p), "without": text_of(model, a),
            "with": text_of(model, b), "same": tuple(a) == tuple(b),
            "answer": None if p.answer is None else text_of(model, p.answer),
        }
        for i, (p, a, b) in enumerate(zip(prompts, plain, steered, strict=True))
    ]  # fmt: skip


def ending(model: "Model", prompt: Prompt) -> str:
    """The end of a prompt."""
    text = text_of(model, prompt.tokens[-SHOWN:])
    return text if len(text) <= SHOWN and len(prompt) <= SHOWN else f"…{text[-SHOWN:]}"


def streamed(
    model: "Model", prompts: Sequence[Prompt], recipe: "Recipe", *, tokens: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """As `continued` without and with a recipe, shown on the terminal while it is produced."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    plain: list[tuple[int, ...]] = []
    steered: list[tuple[int, ...]] = []
    console = Console(file=sys.stdout, highlight=False)
    for prompt in prompts:
        said = ["", ""]

        def drawn(said: list[str] = said) -> Table:
            grid = Table.grid(padding=(0, 3), expand=True)
            grid.add_column(ratio=1)
            grid.add_column(ratio=1)
            grid.add_row(Text("without", style="bold"), Text("with", style="bold green"))
            grid.add_row(Text(said[0]), Text(said[1]))
            return grid

        console.print(Text(ending(model, prompt), style="dim"), soft_wrap=True)
        with Live(drawn(), console=console, refresh_per_second=12) as live:
            for column, some, into in ((0, None, plain), (1, recipe, steered)):

                def show(
                    text: str, column: int = column, said: list[str] = said, live: Any = live
                ) -> None:
                    said[column] = text
                    live.update(drawn(said))

                with produced(model, show):
                    [found] = continued(model, [prompt], some, tokens=tokens, batch_size=1)
                show(text_of(model, found))
                into.append(found)
        console.print()
    return plain, steered


@contextlib.contextmanager
def produced(model: "Model", show: Show) -> Iterator[None]:
    """Show the text produced so far whenever another token is fed back."""
    fed: list[int] = []
    seen: list[int] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return
        if seen:
            fed.append(int(ids[0, -1]))
            show(text_of(model, fed))
        seen.append(1)

    handle = model.hf.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
