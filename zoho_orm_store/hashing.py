"""SHA-256 of several texts at once, none of which can run into the next."""

from __future__ import annotations

from hashlib import sha256

__all__ = ["framed", "hash_of"]


def framed(*parts: str) -> bytes:
    """What is hashed of texts: each with its length, in their order.

    Args:
        parts: The texts; lone surrogates are kept as they are.
    """
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return b"".join([b"%d:%b" % (len(data), data) for data in encoded])


def hash_of(*parts: str) -> bytes:
    """Hash texts, each with its length, in their order.

    Args:
        parts: The texts, as `framed` takes them.
    """
    return sha256(framed(*parts)).digest()
