"""What there is to choose from, read from the sources without importing them.

Detectors and zoo models cannot be imported without torch, which takes seconds; a list of their
names and a refusal of a mistyped one should not. An entry is registered in its own file, so its
name and what it says of itself can be read there. Three forms are known:

    @DETECTORS.register("sink")            a class or function; what it says stands in it
    @maker("vhr", summary=..., ...)        a function; its parameters are keyword-only
    OPS.register("add")(Add())             an instance, alone or in a loop; its class says it
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
    "metric": ("interp.metrics", "METRICS"),
    "probe": ("probes", "PROBES"),
    "recipe maker": ("heads.makers", "maker"),
    "op": ("interp.recipe.ops", "OPS"),
}
KINDS = tuple(_PACKAGES)
_Entry = ast.FunctionDef | ast.ClassDef
_WORDLESS = ("Prompt", "Positions", "Inputs")
"""Parts of the types of parameters that no text stands for."""


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        kind: `detector`, `task`, `zoo model`, `method` (of patching), `metric`, `probe`,
            `recipe maker` or `op`.
        name: its name in the registry.
        summary: one line.
        params: parameter to the text of its default.
        task: the task a detector is run on unless told otherwise.
        citation: where it is from.
        doc: the docstring of its file: formula, null, what published code does.
        unit: what its score counts.
        range: smallest and largest score, as written in its file.
        no_evidence: what it means that a head does not show it.
    """

    kind: str
    name: str
    summary: str
    params: Mapping[str, str]
    task: str = ""
    citation: str = ""
    doc: str = ""
    unit: str = ""
    range: str = ""
    no_evidence: str = ""


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
        constants = _constants(tree)
        for node, mark in _registered(tree, registry, classes):
            lines = _lines(node, classes) if isinstance(node, ast.ClassDef) else []
            said = _said(lines, constants) | _arguments(mark, constants)
            name = said["name"] if mark is None else ast.literal_eval(mark.args[0])
            own = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            summary = (own or ast.get_docstring(tree) or "").strip().split("\n")[0].rstrip(".")
            found[name] = Entry(
                kind, name, said.get("summary") or summary, _params(node, lines, constants),
                said.get("task", ""), said.get("citation", ""),
                (ast.get_docstring(tree) or "").strip(), said.get("unit", ""),
                _plain(lines, "range"), said.get("no_evidence", ""),
            )  # fmt: skip
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


def _registered(
    tree: ast.Module, registry: str, classes: Mapping[str, ast.ClassDef]
) -> Iterator[tuple[_Entry, ast.Call | None]]:
    """What a module registers, and the decorator that does it; None for instances of a class."""
    for node in tree.body:
        if isinstance(node, _Entry):
            for mark in node.decorator_list:
                match mark:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name(id=owner), attr="register")
                        | ast.Name(id=owner),
                        args=[ast.Constant(value=str())],
                    ) if owner == registry:
                        yield node, mark
        elif isinstance(node, ast.Expr | ast.For) and f"{registry}.register(" in ast.unparse(node):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    yield classes[call.func.id], None


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Names that a module gives to values."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _lines(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> list[ast.stmt]:
    """The body of a class after those of its bases in the same package: fields are inherited."""
    bases = [classes[x.id] for x in node.bases if isinstance(x, ast.Name) and x.id in classes]
    return [line for base in bases for line in _lines(base, classes)] + node.body


def _said(lines: Sequence[ast.stmt], constants: Mapping[str, ast.expr]) -> dict[str, str]:
    """The texts that a class says of itself."""
    said: dict[str, str] = {}
    for target, value in _assigned(lines):
        if isinstance(target, ast.Name):
            said |= _text(target.id, value, constants)
    return said


def _plain(lines: Sequence[ast.stmt], name: str) -> str:
    """The value that a class gives to a name, as it is written."""
    return next(
        (ast.unparse(v) for x, v in _assigned(lines) if isinstance(x, ast.Name) and x.id == name),
        "",
    )


def _assigned(lines: Sequence[ast.stmt]) -> Iterator[tuple[ast.expr, ast.expr]]:
    for line in lines:
        match line:
            case ast.AnnAssign(target=target, value=value) if value is not None:
                yield target, value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from zip(names, values, strict=True)
            case ast.Assign(targets=[target], value=value):
                yield target, value


def _arguments(mark: ast.Call | None, constants: Mapping[str, ast.expr]) -> dict[str, str]:
    """The texts that a decorator is given by name."""
    said: dict[str, str] = {}
    for keyword in mark.keywords if mark is not None else ():
        said |= _text(keyword.arg or "", keyword.value, constants)
    return said


def _text(name: str, value: ast.expr, constants: Mapping[str, ast.expr]) -> dict[str, str]:
    value = _meant(value, constants)
    known = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return {name: value.value} if known else {}  # type: ignore[attr-defined]


def _meant(value: ast.expr, constants: Mapping[str, ast.expr]) -> ast.expr:
    return constants.get(value.id, value) if isinstance(value, ast.Name) else value


def _params(
    node: _Entry, lines: Sequence[ast.stmt], constants: Mapping[str, ast.expr]
) -> dict[str, str]:
    """Parameters and the texts of their defaults: fields, or arguments that texts can stand for.

    Of an op it is the strength.
    """
    if isinstance(node, ast.FunctionDef):
        given = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        return {
            x.arg: ast.unparse(_meant(default, constants))
            for x, default in given
            if default is not None
            and not any(word in ast.unparse(x.annotation or x) for word in _WORDLESS)
        }
    fields = {
        line.target.id: ast.unparse(_meant(line.value, constants))
        for line in lines
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
        if "ClassVar" not in ast.unparse(line.annotation)
    }
    own = {x.id: ast.unparse(v) for x, v in _assigned(lines) if isinstance(x, ast.Name)}
    return fields or ({"strength": own["default"]} if "default" in own else {})
