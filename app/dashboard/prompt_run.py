"""Prompts of the page on their way to a model: previewed on the worker, and made a command line."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.dashboard.joblog import Log, logged
from app.dashboard.prompt_diff import Alignment, align
from app.dashboard.prompt_text import MOST, Asked, Written, has_template, written
from app.figures.maps import marked
from app.loading import Source
from interp.errors import InputError, InterpError, RunError
from interp.files import disk_errors, write_atomic

if TYPE_CHECKING:
    from app.dashboard.jobs import Jobs
    from interp.traces.trace import Trace

DRAWN = 8192
"""Most tokens that are drawn."""
FOLDER = "prompts"
ROOM = 256 << 20
"""Most bytes of files of prompts below the folder of the runs."""


def preview(jobs: "Jobs", asked: Asked, timeout: float = 45.0) -> dict[str, Any]:
    """What a model makes of prompts, and what it would take to capture them.

    Args:
        jobs: whose worker holds the model.
        asked: the prompts.
        timeout: seconds to wait.

    Returns:
        `prompts`, each with `id`, `count`, `tokens` (the first `DRAWN`), `ids` of these, `special`
        (places of special tokens), `spans` and `text`; `align` of the first two, see `described`;
        `context`; `cost`, the rows of `capture --dry-run`; `chat`; `warnings`.

    Raises:
        InterpError: the model or the prompts are refused, or the worker is busy.
    """

    def work() -> dict[str, Any]:
        from interp.promptfile import line_of, to_prompts
        from interp.traces.recording import words

        model = jobs.model(asked.source)
        made = written(asked, model)
        warnings = list(made.notes)
        if asked.chat and not has_template(model):
            raise InputError(f"the tokenizer of {model.name} has no chat template")
        lines = [line_of(e, str(e["id"]), str(e["id"]), Path()) for e in made.entries]
        prompts = to_prompts(lines, model)
        special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        shown = []
        for line, prompt in zip(lines[:2], prompts[:2], strict=False):
            some = prompt.tokens[:DRAWN]
            shown.append({
                "id": prompt.id, "count": len(prompt),
                "tokens": [marked(w) for w in words(model, some)], "ids": list(some),
                "special": [i for i, t in enumerate(some) if t in special],
                "spans": {name: [list(r) for r in rs] for name, rs in prompt.spans.items()},
                "text": line.text if line.text is not None and asked.chat else None,
            })  # fmt: skip
            lost = sum(t == unknown for t in prompt.tokens) if unknown is not None else 0
            if lost:
                warnings.append(f"{prompt.id}: {lost} tokens are unknown to the tokenizer")
        longest = max(map(len, prompts))
        over = model.context is not None and longest + asked.generate > model.context
        if over:
            more = f" and {asked.generate} more" if asked.generate else ""
            warnings.append(
                f"the longest prompt has {longest:,} tokens{more}; {model.name} has room for "
                f"{model.context:,}, so it cannot be run"
            )
        return {
            "model": asked.source.name, "prompts": shown, "total": len(prompts),
            "context": model.context, "chat": has_template(model), "warnings": warnings,
            "cost": [] if over else cost(asked, made, warnings), "fits": not over,
            "ids": [list(p.tokens) for p in prompts[:2]],
        }  # fmt: skip

    found = jobs.call(work, timeout)
    ids = found.pop("ids")
    if len(ids) == 2 and len(asked.texts) == 2:
        found["align"] = described(align(*ids))
    return found


def described(found: Alignment) -> dict[str, Any]:
    """Which tokens of two prompts differ, for a page: places in A and in B.

    Returns:
        `differs`, pairs of places whose tokens differ; `only_a` and `only_b`; `pairs`, how many
        pairs there are; `searched`. Places beyond the first `DRAWN` are left out of the lists.
    """
    differs = found.pairs[found.differs]
    return {
        "pairs": len(found), "differing": len(differs),
        "differs": [p for p in differs.tolist() if max(p) < DRAWN],
        "only_a": [i for i in found.only_a if i < DRAWN],
        "only_b": [i for i in found.only_b if i < DRAWN],
        "lone": [len(found.only_a), len(found.only_b)], "searched": found.searched,
    }  # fmt: skip


def cost(asked: Asked, made: Written, warnings: list[str]) -> list[dict[str, Any]]:
    """The rows of `capture --dry-run`, for the worker; what it refuses becomes a warning."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text(made.jsonl, encoding="utf-8")
        argv = ["capture", *_common(asked), "--prompts", str(path)]
        try:
            rows = answer_of([*argv, "--dry-run", "--format", "json"])["rows"]
        except InterpError as error:
            warnings.append(str(error))
            return []
    return list(rows)


class _Answer(Log):
    """A log that keeps all of stdout."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def write(self, stream: str, text: str) -> int:
        if stream == "stdout" and not self._aside:
            self.parts.append(text)
            return len(text)
        return super().write(stream, text)


def answer_of(argv: Sequence[str]) -> dict[str, Any]:
    """What a command answers with `--format json`; for the worker.

    Raises:
        InputError: it ends in an error; its line and hint.
    """
    from app.commands import main

    log = _Answer()
    with logged(log):
        code = main(list(argv))
    log.end()
    if code:
        said, hint = log.verdict()
        raise InputError(said or f"the command ended with exit code {code}", hint=hint)
    found: dict[str, Any] = json.loads("".join(log.parts))
    return found


def _common(asked: Asked) -> list[str]:
    source = asked.source
    given = {"--device": source.device, "--dtype": source.dtype, "--attn": source.attn,
             "--revision": source.revision}  # fmt: skip
    out = ["--model", source.name]
    out += [x for k, v in given.items() if v not in (None, "auto") for x in (k, str(v))]
    out += ["--offline"] if source.offline else []
    return out + (["--generate", str(asked.generate)] if asked.generate else [])


def line_for(asked: Asked, made: Written, root: Path, *, write: bool = True) -> list[str]:
    """The arguments of `headscope capture` for prompts; long or odd ones go to a file.

    Raises:
        RunError: the file cannot be written, or there is no room left for it.
    """
    head = ["capture", *_common(asked)]
    if made.short:
        return [*head, *(x for e in made.entries for x in ("--prompt", str(e["text"])))]
    return [*head, "--prompts", str(kept(made.jsonl, root, write=write))]


def kept(jsonl: str, root: Path, *, write: bool = True) -> Path:
    """The file that holds prompts, named by a hash of what it holds.

    Raises:
        RunError: it cannot be written, or there is no room left for it.
    """
    data = jsonl.encode()
    place = root / FOLDER / f"{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
    if not write or place.exists():
        return place
    with disk_errors(place.parent, "create"):
        place.parent.mkdir(parents=True, exist_ok=True)
        held = sum(p.stat().st_size for p in place.parent.glob("*.jsonl"))
    if held + len(data) > ROOM:
        raise RunError(
            f"files of prompts may take {ROOM >> 20} MiB; there are {held >> 20} in {place.parent}",
            hint="delete those that are not needed",
        )
    write_atomic(place, data)
    return place


def text_of(jobs: "Jobs | None", trace: "Trace", source: Source | None) -> tuple[str, str]:
    """The text of a trace's prompt, to be worked on; and what is to be said of it.

    A prompt made by a task is kept as tokens: its tokenizer, if there is one, writes their text.
    """
    text = str(trace.info.get("text") or "")
    if text:
        return text, ""
    ids = trace.info.get("ids")
    joined = "".join(trace.tokens)[:MOST]
    if jobs is None or source is None or not isinstance(ids, list):
        return joined, "joined from its tokens"

    def decode() -> tuple[str, str]:
        tokenizer: Any = jobs.model(source).tokenizer
        if tokenizer is None:
            return json.dumps({"tokens": ids}), "token ids: this model has no tokenizer"
        found = str(tokenizer.decode(ids, skip_special_tokens=True))
        same = list(tokenizer(found).input_ids) == ids
        return found, "" if same else "its text is tokenised to other tokens than the prompt's"

    try:
        return jobs.call(decode, 20.0)
    except InterpError as error:
        return joined, f"joined from its tokens: {error}"
