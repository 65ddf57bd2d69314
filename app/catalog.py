"""What there is to choose from, read from the sources without importing them.

Detectors and zoo models cannot be imported without torch, which takes seconds; a list of their
names and a refusal of a mistyped one should not. An entry is registered by a decorator in its own
file, `@DETECTORS.register("sink")`, so its name and what it says of itself can be read there.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from interp.errors import UnknownNameError

_PACKAGES: Mapping[str, tuple[str, str]] = {
    "detector": ("heads", "DETECTORS"),
    "task": ("interp.tasks", "TASKS"),
    "zoo model": ("interp.zoo", "ZOO"),
    "method": ("patching", "METHODS"),
    "probe": ("probes", "PROBES"),
}
KINDS = tuple(_PACKAGES)
_Entry = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        kind: `detector`, `task`, `zoo model`, `method` (of patching) or `probe`.
        name: its name in the registry.
        summary: one line.
        params: parameter to the text of its default.
        task: the task a detector is run on unless told otherwise.
        citation: where it is from.
    """

    kind: str
    name: str
    summary: str
    params: Mapping[str, str]
    task: str = ""
    citation: str = ""


@cache
def entries(kind: str) -> Mapping[str, Entry]:
    """Every entry of a kind, by name, in the order of names."""
    package, registry = _PACKAGES[kind]
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    paths = [p for f in spec.submodule_search_locations for p in sorted(Path(f).glob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    classes = {x.name: x for tree in trees for x in tree.body if isinstance(x, ast.ClassDef)}
    found = {}
    for tree in trees:
        for node, name in _registered(tree, registry):
            lines = _lines(node, classes) if isinstance(node, ast.ClassDef) else []
            found[name] = _entry(kind, name, node, lines, ast.get_docstring(tree) or "")
    return dict(sorted(found.items()))


def check(kind: str, name: str) -> Entry:
    """The entry of a name.

    Raises:
        UnknownNameError: there is none; the hint names the nearest.
    """
    known = entries(kind)
    if name not in known:
        raise UnknownNameError(kind, name, known)
    return known[name]


def _registered(tree: ast.Module, registry: str) -> Iterator[tuple[_Entry, str]]:
    for node in tree.body:
        if isinstance(node, _Entry):
            for mark in node.decorator_list:
                match mark:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=owner), attr="register"),
                        args=[ast.Constant(value=str(name))],
                    ) if owner == registry:
                        yield node, name


def _lines(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.stmt]:
    """The body of a class after those of its bases in the same package: fields are inherited."""
    bases = [classes[x.id] for x in node.bases if isinstance(x, ast.Name) and x.id in classes]
    return [line for base in bases for line in _lines(base, classes)] + node.body


def _entry(kind: str, name: str, node: _Entry, lines: Sequence[ast.stmt], module: str) -> Entry:
    said: dict[str, str] = {}
    params = {}
    for line in lines:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            if "ClassVar" not in ast.unparse(line.annotation):
                params[line.target.id] = ast.unparse(line.value)
            elif isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
                said[line.target.id] = line.value.value
    own = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
    summary = said.get("summary") or (own or module).strip().split("\n")[0].rstrip(".")
    return Entry(kind, name, summary, params, said.get("task", ""), said.get("citation", ""))
