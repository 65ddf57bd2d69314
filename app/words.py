"""Hints of the library in the words of the command line.

The library speaks to those who write Python: `k=`, `force=True`, `Where(heads=…)`. Here each such
phrase becomes the option that does the same; a hint that only Python can follow is left out.
"""

import re
from collections.abc import Sequence

_OPTIONS: Sequence[tuple[str, str]] = (
    # Whole phrases first: what stands in brackets would be taken apart by the rules below.
    (r"Recipe\(\[?Edit\('zero', Where\(heads=.*?\)\)\]?\)", "headscope steer run --op zero"),
    (r"Where\(heads=\.\.\., keys=span\('(\w+)'\)\)", r"--keys span:\1"),
    (r"Where\(layers=\(3,\)\)", "--heads L3"),
    (r"Where\(\.\.\., (?:layers|heads|tower)=\.\.\.\)", "--heads"),
    (r"queries=Positions\(prompt='all'\)", "--at prompt"),
    (r"keys=Positions\(.*?\)", "other --keys"),
    (r"heads=None for all of them", "--heads all"),
    (r"force=True \(--force\)", "--force"),
    (r"replace\(recipe, fingerprint=None\) is a recipe for any model", "--force takes it anyway"),
    (r"most=\.\.\., or name it: heads=\[\.\.\.\]", "--most, or name it: --heads"),
    (r"most=\.\.\. or heads=\[\.\.\.\]", "--most or --heads"),
    (r"pass tokenizer=\.\.\. to interp\.load, or prompts", "give prompts"),
    (r"pass (\w+)=\.\.\. to interp\.load\b.*", r"the model's folder must hold its \1"),
    (r"prompts made by interp\.images\.image_prompt", "--prompts with images"),
    (r"make (?:it|prompts) with interp\.images\.image_prompt", "give --prompts with images"),
    (r"use its fast version \(.*?\), or style=ids", "use style=ids"),
    (r"load the model with attn_implementation='(\w+)'", r"load the model with --attn \1"),
    (r"\battn='(\w+)'", r"--attn \1"),
    (r"\bop='(\w+)'", r"--op \1"),
    (r"\bstyle=ids", "--param TASK:style=ids"),
    (r"use direction=(\w+)", r"use --direction \1 (of attribute: --param METHOD:direction=\1)"),
    (r"give (k|n)= at most", r"give --\1 at most"),
    (r"\b(k|n|most|draws|folds|controls|tokens)=(\d+)", r"--\1 \2"),
    (r"layers=\((\d+), (\d+)\)", r"--heads L\1-\2, or --param METHOD:layers=\1,\2"),
    (r"sinks=\[\(0,\), …\], dims=… or a smaller tau=…", "--param METHOD:dims=… or a smaller tau"),
    (r", or raise max_pixels", ""),
    (r"\bbatch_size\b", "--batch-size"),
    (r"\btop\(n\)", "--top"),
    (r"(?<![:\w-])([a-z]+)='?(\w+)'?(?![\w(\[])", r"--param METHOD:\1=\2"),
    (r"(?<![:\w-])([a-z]+)=\.\.\.", r"--param METHOD:\1=..."),
)  # fmt: skip
_PYTHON = re.compile(r"\w\(|\w\[|[\w']=|\binterp\.|\bheads\.|_\w|\[…|meta=")
_COMMAND = re.compile(r"--[\w-]+(?: [\w-]+:\w+=\S+)?|headscope .*")


def spoken(hint: str | None) -> str | None:
    """A hint in the words of the command line; None where it has none.

    >>> spoken("force=True (--force) uses it all the same")
    '--force uses it all the same'
    """
    if hint is None or "headscope " in hint:
        return hint
    for phrase, words in _OPTIONS:
        hint = re.sub(phrase, words, hint)
    return None if _PYTHON.search(_COMMAND.sub("", hint)) else hint


def said(message: str) -> str:
    """An error text without what only Python has a name for."""
    return re.sub(r" in meta\['\w+'\]", "", message)
