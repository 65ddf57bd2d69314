"""Names of heads: `L9H6` in the default tower, `vision.L3H2` in another.

Indices are 0-based. `9.6` and `vision.3.2` are read as well. A head is a *query* head; its
key-value group is `head // (n_heads // n_kv_heads)`.
"""

import re
from dataclasses import dataclass

from interp.errors import HeadIdError

DEFAULT_TOWER = "text"
_FORM = re.compile(r"(?:(?P<tower>[A-Za-z_][\w-]*)\.)?[Ll]?(?P<layer>\d+)(?:\.|[Hh])(?P<head>\d+)")


@dataclass(frozen=True, order=True, repr=False)
class HeadId:
    """One attention head of a model.

    Attributes:
        layer: 0-based layer of the tower.
        head: 0-based query head of the layer.
        tower: `text` (also the only tower of a plain model), `encoder`, `vision`, `cross`, …

    >>> str(HeadId(9, 6)), str(HeadId(3, 2, "vision"))
    ('L9H6', 'vision.L3H2')
    """

    layer: int
    head: int
    tower: str = DEFAULT_TOWER

    def __str__(self) -> str:
        prefix = "" if self.tower == DEFAULT_TOWER else f"{self.tower}."
        return f"{prefix}L{self.layer}H{self.head}"

    def __repr__(self) -> str:
        return f"HeadId({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> "HeadId":
        """Read `L9H6`, `9.6`, `vision.L3H2` or `vision.3.2`.

        Raises:
            HeadIdError: the text is none of these.

        >>> HeadId.parse("9.6") == HeadId.parse("L9H6")
        True
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise HeadIdError(
                f"a head is written L9H6, 9.6 or vision.L3H2; got {text!r}",
                hint="layers and heads count from 0",
            )
        return cls(int(match["layer"]), int(match["head"]), match["tower"] or DEFAULT_TOWER)
