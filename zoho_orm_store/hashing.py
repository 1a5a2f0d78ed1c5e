"""SHA-256 of several texts at once, none of which can run into the next."""

from __future__ import annotations

from hashlib import sha256

__all__ = ["hash_of"]


def hash_of(*parts: str) -> bytes:
    """Hash texts, each with its length, in their order.

    Args:
        parts: The texts; lone surrogates are hashed as they are.
    """
    hashed = sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hashed.update(b"%d:" % len(data) + data)
    return hashed.digest()
