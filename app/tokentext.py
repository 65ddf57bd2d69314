"""Text that anybody wrote, as a page may show it: no markup, no sign without a shape of its own."""

import html
import unicodedata

_KNOWN = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def shown(token: str, most: int = 32) -> str:
    r"""A token as people can read it: spaces as dots, controls and hidden signs written out.

    Args:
        token: the token.
        most: signs of it to show; a longer one ends in an ellipsis.

    >>> print(shown(" a\n"), shown(""), shown("\u202eb"))
    ·a\n "" \u202eb
    """
    out = "".join("·" if c == " " else _sign(c) for c in token[:most])
    return (out or '""') + ("…" if len(token) > most else "")


def markup(text: str) -> str:
    r"""A text as part of an HTML page, spaces as they are.

    >>> markup("<b>\u202e")
    '&lt;b&gt;\\u202e'
    """
    return html.escape("".join(c if c == " " else _sign(c) for c in text))


def _sign(c: str) -> str:
    # Controls, formats such as bidi marks, surrogates, private and unassigned signs, separators.
    if unicodedata.category(c)[0] not in "CZ":
        return c
    return _KNOWN.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}")
