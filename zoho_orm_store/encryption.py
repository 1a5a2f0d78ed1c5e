"""Ciphers for the secrets in the table: the protocol, and the one made of Fernet keys."""

from __future__ import annotations

import hmac
import logging
import os
import re
import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from zoho_orm_store._database.forks import notice_fork, tell_forked_children
from zoho_orm_store._digests import hash_of
from zoho_orm_store.errors import (
    CipherError,
    ConfigurationError,
    MissingDependencyError,
    ZohoOrmStoreError,
    boundary,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

    from cryptography.fernet import Fernet

__all__ = ["KEYS_VARIABLE", "FernetCipher", "TokenCipher", "generate_key"]

KEYS_VARIABLE = "ZOHO_ORM_STORE_KEYS"
"""The environment variable that holds a `FernetCipher`'s keys."""

_RELOAD_AFTER = 1.0
_REFRESH_AFTER = 60.0
_ID_LENGTH = 12
_FOR_DIGESTS = b"zoho_orm_store digests"
_MAKE_ONE = "Make one with: zoho-orm-store keys generate"

logger = logging.getLogger("zoho_orm_store")

Keys: TypeAlias = "str | bytes | Iterable[str | bytes]"

our_errors = boundary(lambda error: error if isinstance(error, ZohoOrmStoreError) else None)


class TokenCipher(Protocol):
    """Encrypts and decrypts secrets, under keys that have names.

    A store may call it from several threads at once. Whatever it raises becomes a `CipherError`
    that does not show the error's text.

    Two things more are up to you:

    - If `encrypt` and `decrypt` have a parameter ``context``, they are given the value's place as a
      mapping of texts, for a key service to bind and to audit: ``column``, ``id``, ``user_name``,
      ``client_id``, and the columns of the scope. What is unknown is left out.
    - A method ``digest_keys()`` that returns keys for digests, by the id of the key: random
      ``bytes``, 32 of them. It must have one for each key that may have encrypted a stored token.
      Digests are then keyed; without it, they are plain SHA-256, which shows to somebody who has a
      list of user names which of them are stored.
    """

    @property
    def key_id(self) -> str | None:
        """The name of the key that encrypts now, stored with every value.

        At most 64 letters, digits and ``_.:/-``. ``None`` leaves new values in plain text, while
        encrypted values can still be read.
        """
        ...

    def encrypt(self, plaintext: bytes, key_id: str) -> str:
        """Encrypt, so that the result can neither be read nor changed.

        Args:
            plaintext: A secret, and a digest that binds it to its row and column.
            key_id: The key, as `key_id` named it.

        Returns:
            ASCII text, such as base64, of at most 65,464 characters.
        """
        ...

    def decrypt(self, ciphertext: str, key_id: str) -> bytes | None:
        """Decrypt what `encrypt` returned.

        Args:
            ciphertext: The stored text. Somebody may have changed it.
            key_id: The name of the key that encrypted it.

        Returns:
            The plaintext; ``None`` if the ciphertext is not genuine.

        Raises:
            LookupError: There is no such key.
            ValueError: The ciphertext is not genuine.
        """
        ...


class KeysUnavailableError(CipherError):
    """The function that returns a `FernetCipher`'s keys failed when it was called again."""


class FernetCipher:
    """A `TokenCipher` on cryptography's Fernet: AES in CBC mode, authenticated by HMAC-SHA256.

    The first key encrypts, all of them decrypt. Its ``repr`` shows key ids, which are fingerprints
    of keys, and never a key. It cannot be pickled.

    Args:
        keys: Keys as ``zoho-orm-store keys generate`` makes them: one, several, or a function that
            returns them, such as a call to a secret manager. The function is called now. It is
            called again, at most once a second, when a token needs a key that is not among them,
            and when a token is saved and the keys are older than a minute, so that running workers
            learn of a new key. ``None`` reads the environment variable ``ZOHO_ORM_STORE_KEYS``,
            where commas or blanks separate keys.
        encrypts: Whether new values are encrypted. ``False`` only decrypts, for the time in which
            some workers do not have the keys yet, or will soon have none.

    Raises:
        ConfigurationError: There is no key, or one is malformed; the message says which.
        MissingDependencyError: The package cryptography is not installed.
    """

    @our_errors
    def __init__(
        self, keys: Keys | Callable[[], Keys] | None = None, *, encrypts: bool = True
    ) -> None:
        self._keys: dict[str, _Key] = {}
        self._problem = ""
        self._encrypts = encrypts
        self._load = keys if callable(keys) else None
        given = os.environ.get(KEYS_VARIABLE, "") if keys is None else keys
        self._keys, problem = _parse_keys(given() if callable(given) else given)
        if problem:
            raise ConfigurationError(problem)
        self._loaded_at = self._asked_at = monotonic()
        self._lock = threading.Lock()
        tell_forked_children(self)

    def _forked(self) -> None:
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        # A traceback may show the cipher of a constructor that has failed.
        only = "" if self._encrypts else ", encrypts=False"
        return f"FernetCipher(<keys {', '.join(self._keys)}>{only})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A FernetCipher holds keys and cannot be pickled. Make one per process.")

    @property
    def key_id(self) -> str | None:
        """The first key's id, or ``None`` if this cipher only decrypts."""
        if not self._encrypts:
            return None
        if monotonic() - self._asked_at > _REFRESH_AFTER:
            self._look_for_a_new_key()
        return next(iter(self._keys))

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, the one that encrypts first."""
        return tuple(self._keys)

    def encrypt(self, plaintext: bytes, key_id: str) -> str:
        """Encrypt under the key with an id; see `TokenCipher.encrypt`."""
        return self._keys[key_id].fernet.encrypt(plaintext).decode()

    def decrypt(self, ciphertext: str, key_id: str) -> bytes | None:
        """Decrypt with the key that has an id; see `TokenCipher.decrypt`."""
        key = self._keys.get(key_id) or self._reloaded_key(key_id)
        try:
            return key.fernet.decrypt(ciphertext)
        except _invalid_token():
            return None

    def digest_keys(self) -> Mapping[str, bytes]:
        """Return keys for digests, derived from this cipher's, by the id of the key.

        If the keys come from a function and are older than a minute, it is called again.
        """
        if monotonic() - self._asked_at > _REFRESH_AFTER:
            self._look_for_a_new_key()
        return {key_id: key.for_digests for key_id, key in self._keys.items()}

    def _reloaded_key(self, key_id: str) -> _Key:
        """Reload the keys and return one; concurrent callers share one reload."""
        notice_fork()
        with self._lock:
            if key_id not in self._keys:
                if monotonic() - self._loaded_at > _RELOAD_AFTER:
                    self._reload()
                elif self._problem:
                    raise KeysUnavailableError(self._problem)
            return self._keys[key_id]

    def _look_for_a_new_key(self) -> None:
        """Reload the keys; meanwhile and after a failure, callers use the known ones."""
        self._asked_at = monotonic()
        notice_fork()
        try:
            with self._lock:
                self._reload()
        except KeysUnavailableError as error:
            logger.warning("%s The known keys stay in use until it succeeds.", error)

    def _reload(self) -> None:
        if self._load is None:
            return
        try:
            keys, problem = _parse_keys(self._load())
        except Exception as error:  # noqa: BLE001 - a secret manager's client raises anything
            keys, problem = self._keys, f"It raised {type(error).__name__}."
        self._loaded_at = self._asked_at = monotonic()
        self._problem = problem and (
            f"The function that returns a FernetCipher's keys failed. {problem}"
        )
        if problem:
            raise KeysUnavailableError(self._problem)
        self._keys = keys


@our_errors
def generate_key() -> str:
    """Make a new key for a `FernetCipher`.

    Raises:
        MissingDependencyError: The package cryptography is not installed.
    """
    return _fernet().generate_key().decode()


def _fernet() -> type[Fernet]:
    try:
        from cryptography.fernet import Fernet
    except ModuleNotFoundError:
        raise MissingDependencyError("cryptography", "encryption") from None
    return Fernet


@cache
def _invalid_token() -> type[Exception]:
    from cryptography.fernet import InvalidToken

    return InvalidToken


class _Key(NamedTuple):
    fernet: Fernet
    for_digests: bytes


def _parse_keys(given: object) -> tuple[dict[str, _Key], str]:
    """The keys by their ids, in their order, or what is wrong with them."""
    fernet, keys = _fernet(), dict[str, _Key]()
    if isinstance(given, bytes):
        given = given.decode("ascii", "replace")
    if isinstance(given, str):
        given = re.split(r"[\s,]+", given.strip())
    texts = [*given] if isinstance(given, Iterable) else [given]
    if not any(texts):
        return {}, f"There is no key. Pass keys, or set {KEYS_VARIABLE}. {_MAKE_ONE}"
    for number, text in enumerate(texts, 1):
        key = _key_bytes(text)
        if key is None:
            which = f"Key {number} of {len(texts)}" if len(texts) > 1 else "The key"
            problem = "is not a Fernet key of 44 characters of URL-safe base64"
            return {}, f"{which} {problem}. {_MAKE_ONE}"
        for_digests = hmac.digest(key, _FOR_DIGESTS, "sha256")
        key_id = hash_of("key", key.hex())[:_ID_LENGTH]
        keys[key_id] = _Key(fernet(urlsafe_b64encode(key)), for_digests)
    return keys, ""


def _key_bytes(text: object) -> bytes | None:
    if not isinstance(text, str | bytes):
        return None
    try:
        key = urlsafe_b64decode(text)
    except ValueError:
        return None
    return key if len(key) == 32 and len(text) == 44 else None
