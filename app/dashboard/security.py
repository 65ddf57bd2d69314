"""What the server lets in and what its pages may do.

Bound to loopback it answers only to loopback's names: any other `Host` may be a foreign page whose
name was pointed at this machine. A POST must come from a page of its own. On another address a
token is needed, given once in the URL and kept in a cookie. Pages run no script but the server's
own, load nothing from elsewhere, and stand in no frame.
"""

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Flask, Response, abort, redirect, request

LIMIT = 4 << 20
"""Bytes of a request."""
COOKIE = "headscope-token"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Access:
    """Who may talk to the server.

    Attributes:
        host: address it is bound to.
        port: port it is bound to.
        token: what must be known to get in; None asks for nothing.
    """

    host: str
    port: int
    token: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """`Host` headers that are answered."""
        named = {self.host, *_LOOPBACK} if is_loopback(self.host) else {self.host}
        return frozenset(
            {f"{n}:{self.port}" for n in named} | (named if self.port == 80 else set())
        )

    def knows(self, host: str) -> bool:
        """Whether a `Host` header is one of ours; bound to all addresses, any address is."""
        if self.host in ("0.0.0.0", "::"):
            name = host.rpartition(":")[0].strip("[]")
            return name == "localhost" or _is_address(name)
        return host in self.names


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def guard(server: Flask, access: Access, hashes: Sequence[str]) -> None:
    """Put the rules of this module before and after every request.

    Args:
        server: the Flask application.
        access: who may talk to it.
        hashes: of the inline scripts that the page itself brings; may still grow.
    """
    server.config["MAX_CONTENT_LENGTH"] = LIMIT

    @server.before_request
    def check() -> Any:
        if not access.knows(request.headers.get("Host", "")):
            abort(400, "this server answers to its own address only")
        if request.method not in ("GET", "HEAD") and not _own_page():
            abort(403, "requests that change something must come from this server's own page")
        return _with_token(access)

    @server.after_request
    def fence(response: Response) -> Response:
        scripts = " ".join(["'self'", *hashes])
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response


def _own_page() -> bool:
    site = request.headers.get("Sec-Fetch-Site")
    if site not in (None, "same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    return origin is None or origin == f"{request.scheme}://{request.headers.get('Host')}"


def _with_token(access: Access) -> Any:
    if access.token is None:
        return None
    given = request.args.get("token")
    if given is not None:
        if not hmac.compare_digest(given.encode(), access.token.encode()):
            abort(401, "the token is wrong")
        answer = redirect(request.path)
        answer.set_cookie(COOKIE, access.token, httponly=True, samesite="Strict")
        return answer
    kept = request.cookies.get(COOKIE, "")
    if not hmac.compare_digest(kept.encode(), access.token.encode()):
        abort(401, "a token is needed: open the address that `headscope serve` printed")
    return None
