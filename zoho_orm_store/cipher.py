"""How secrets are kept: under which key, and bound to the row and the column that they are in.

A stored value says what it is. An encrypted one is ``$zos1$<key id>$<ciphertext>``; anything else
is plain text. (A plain text that begins like an encrypted value is kept with an empty key id.)
What is encrypted begins with a digest of the value's place, so that a ciphertext that somebody
copies into another row or column does not pass for that row's own.
"""

from __future__ import annotations

import logging
import os
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from hmac import compare_digest
from operator import attrgetter
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from zoho_orm_store.errors import (
    CipherError,
    ConfigurationError,
    MissingDependencyError,
    UndecryptableTokenError,
    without_frames,
)
from zoho_orm_store.forks import tell_forked_children
from zoho_orm_store.hashing import framed, hash_of
from zoho_orm_store.record import TokenRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from cryptography.fernet import Fernet

    from zoho_orm_store.errors import ZohoOrmStoreError

__all__ = [
    "KEYS_VARIABLE",
    "MARK",
    "PLAIN",
    "SECRET_COLUMNS",
    "FernetCipher",
    "TokenCipher",
    "Vault",
    "check_cipher",
    "generate_key",
    "key_of",
    "misplaced",
    "prefix_of",
]

KEYS_VARIABLE = "ZOHO_ORM_STORE_KEYS"
"""The environment variable that holds a `FernetCipher`'s keys."""

MARK = "$zos1$"
"""What an encrypted value begins with."""

SECRET_COLUMNS = ("client_secret", "refresh_token", "access_token", "grant_token")
"""The columns that are encrypted, in the order of a `TokenRecord`'s fields."""

_secrets_of = attrgetter(*SECRET_COLUMNS)
_SECRETS_IN_A_ROW = tuple((TokenRecord.__match_args__.index(name), name) for name in SECRET_COLUMNS)
_HOLDER_LENGTH = len(("id", "user_name", "client_id"))
_MARK_LENGTH = len(MARK)
_COLUMN_FRAMED = {name: framed(name) for name in SECRET_COLUMNS}
_KEY_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_MEMBERS = ("key_id", "encrypt", "decrypt")
_PLACE_BYTES = 32
_LONGEST_CIPHERTEXT = 65_535 - len(f"{MARK}$") - 64
"""What fits into a column of MySQL's, behind the longest key id."""

_RELOAD_AFTER = 1.0
_REFRESH_AFTER = 60.0

logger = logging.getLogger("zoho_orm_store")

Keys: TypeAlias = "str | bytes | Iterable[str | bytes]"


class TokenCipher(Protocol):
    """What encrypts and decrypts secrets, under keys that have names.

    A store may call it from several threads at once. Whatever it raises becomes a `CipherError`
    that does not show it.
    """

    @property
    def key_id(self) -> str | None:
        """The name of the key that encrypts now, stored with every value.

        At most 64 letters, digits and ``_.:/-``. ``None`` leaves new values plain, while those
        that are encrypted can still be read.
        """
        ...

    def encrypt(self, plaintext: bytes, key_id: str) -> str:
        """Encrypt, so that the result can neither be read nor changed.

        Args:
            plaintext: A secret, and what binds it to its place.
            key_id: The key, as `key_id` named it.

        Returns:
            ASCII text, such as base64, of 65,464 characters at most.
        """
        ...

    def decrypt(self, ciphertext: str, key_id: str) -> bytes | None:
        """Decrypt what `encrypt` returned.

        Args:
            ciphertext: What was stored; it may have been tampered with.
            key_id: The name of the key that encrypted it.

        Returns:
            The plaintext; ``None`` where the ciphertext is not genuine.

        Raises:
            LookupError: There is no such key.
            ValueError: The ciphertext is not genuine either.
        """
        ...


class KeysUnavailableError(CipherError):
    """The function that gives a `FernetCipher` its keys has failed, when it was asked again."""


class FernetCipher:
    """A `TokenCipher` on cryptography's Fernet: AES in CBC mode, authenticated by HMAC-SHA256.

    The first key encrypts, all of them decrypt. Its ``repr`` shows key ids, which are fingerprints
    of keys, and never a key; it cannot be pickled.

    Args:
        keys: Keys as ``zoho-orm-store keys generate`` makes them: one, several, or a function that
            returns them, such as a call to a secret manager. The function is called now; again
            when a token meets a key that is not among them, at most once a second; and, if the
            keys are older than a minute, when a token is saved: so that running workers learn of
            a new key. ``None`` takes the environment variable ``ZOHO_ORM_STORE_KEYS``, where
            commas or blanks separate keys.
        encrypts: Whether new values are encrypted. ``False`` only decrypts, for the time in which
            some workers have no keys yet, or shall soon have none any more.

    Raises:
        ConfigurationError: There is no key, or one is malformed; the message says which.
        MissingDependencyError: The package cryptography is not installed.
    """

    @without_frames
    def __init__(
        self, keys: Keys | Callable[[], Keys] | None = None, *, encrypts: bool = True
    ) -> None:
        self._ring: dict[str, Fernet] = {}
        self._problem = ""
        self._encrypts = encrypts
        self._load = keys if callable(keys) else None
        given = _from_environment() if keys is None else keys() if callable(keys) else keys
        self._ring, problem = _ring_of(given)
        if problem:
            raise ConfigurationError(problem)
        self._loaded_at = self._asked_at = monotonic()
        self._lock = Lock()
        tell_forked_children(self)

    def _forked(self) -> None:
        """Start anew in a forked child, where nobody is loading keys."""
        self._lock = Lock()

    def __repr__(self) -> str:
        # A traceback may show the cipher of a constructor that has failed.
        only = "" if self._encrypts else ", encrypts=False"
        return f"FernetCipher(<keys {', '.join(self._ring)}>{only})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A FernetCipher holds keys and is not pickled. Make one in each process.")

    @property
    def key_id(self) -> str | None:
        """The first key's id, or ``None`` if this cipher only decrypts."""
        if not self._encrypts:
            return None
        if monotonic() - self._asked_at > _REFRESH_AFTER:
            self._refresh()
        return next(iter(self._ring))

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, the one that encrypts first."""
        return tuple(self._ring)

    def encrypt(self, plaintext: bytes, key_id: str) -> str:
        """Encrypt under the key with an id; see `TokenCipher.encrypt`."""
        return self._ring[key_id].encrypt(plaintext).decode()

    def decrypt(self, ciphertext: str, key_id: str) -> bytes | None:
        """Decrypt with the key that has an id; see `TokenCipher.decrypt`."""
        fernet = self._ring.get(key_id) or self._learned(key_id)
        try:
            return fernet.decrypt(ciphertext)
        except _invalid_token():
            return None

    def _learned(self, key_id: str) -> Fernet:
        """A key that the function may name by now. Whoever needs it waits for the first to ask."""
        with self._lock:
            if key_id not in self._ring:
                if monotonic() - self._loaded_at > _RELOAD_AFTER:
                    self._reload()
                elif self._problem:
                    raise KeysUnavailableError(self._problem)
            return self._ring[key_id]

    def _refresh(self) -> None:
        """Learn of a new first key now and then, while others go on with the one that is known."""
        self._asked_at = monotonic()
        try:
            with self._lock:
                self._reload()
        except KeysUnavailableError as error:
            logger.warning("%s Until it does, the keys that are known are used.", error)

    def _reload(self) -> None:
        if self._load is None:
            return
        try:
            ring, problem = _ring_of(self._load())
        except Exception as error:  # noqa: BLE001 - a secret manager's client raises what it likes
            ring, problem = self._ring, f"It raised {type(error).__name__}."
        self._loaded_at = self._asked_at = monotonic()
        self._problem = problem and (
            f"The function that gives a FernetCipher its keys did not name them. {problem}"
        )
        if problem:
            raise KeysUnavailableError(self._problem)
        self._ring = ring


def generate_key() -> str:
    """Make a new key for a `FernetCipher`.

    Raises:
        MissingDependencyError: The package cryptography is not installed.
    """
    return _fernet().generate_key().decode()


def prefix_of(key_id: str) -> str:
    """What every value that is encrypted under a key begins with."""
    return f"{MARK}{key_id}$"


def key_of(stored: str) -> str | None:
    """The id of the key that a stored value is encrypted under.

    ``None`` stands for plain text, and ``""`` for what is garbled and names no key.
    """
    if not stored.startswith(MARK) or stored.startswith(prefix_of("")):
        return None
    key_id, separator, _ = stored[len(MARK) :].partition("$")
    return key_id if separator and _KEY_ID.fullmatch(key_id) else ""


def check_cipher(cipher: object) -> None:
    """Refuse what is given for a cipher and is none.

    Raises:
        ConfigurationError: It lacks a member of `TokenCipher`, or is a class.
    """
    if cipher is None:
        return
    # On the type first: a property of the object's may be slow, and may fail.
    has_all = all(hasattr(type(cipher), name) or hasattr(cipher, name) for name in _MEMBERS)
    if isinstance(cipher, type) or not has_all:
        given = cipher.__name__ if isinstance(cipher, type) else f"a {type(cipher).__name__}"
        raise ConfigurationError(
            f"The cipher must be an object with {', '.join(_MEMBERS)}, such as "
            f"FernetCipher(keys), and not {given}."
        )


class Vault:
    """Turns the secrets of a record into what is stored, and back.

    Args:
        cipher: What encrypts, or ``None``, which keeps plain text and cannot read anything else.
        fence: What else the place of a value is made of: the values of a scope.

    Raises:
        ConfigurationError: What is given for a cipher is none.
    """

    def __init__(self, cipher: TokenCipher | None, fence: tuple[str, ...] = ()) -> None:
        check_cipher(cipher)
        self._cipher = cipher
        self._fence = framed(*fence)

    @property
    def prefix(self) -> str | None:
        """What an encrypted value begins with now; ``None`` where values are kept plain."""
        key_id = self._key_id()
        return None if key_id is None else prefix_of(key_id)

    def sealed(self, record: TokenRecord) -> dict[str, str | None]:
        """The columns of a record's secrets, as they are to be stored.

        Raises:
            CipherError: The cipher failed.
            ConfigurationError: The cipher's key id cannot be stored.
        """
        key_id = self._key_id()
        values = zip(SECRET_COLUMNS, _secrets_of(record), strict=True)
        if key_id is None:
            return {column: _literal(value) for column, value in values}
        holder = self._holder(record.id, record.user_name, record.client_id)
        return {
            column: None if value is None else self._sealed(value, column, holder, key_id)
            for column, value in values
        }

    def opened(self, row: Sequence[Any]) -> TokenRecord:
        """The record of a stored row, its secrets in plain text.

        Args:
            row: The values of a record's fields, in their order.

        Raises:
            UndecryptableTokenError: A secret is encrypted, and nothing opens it; the message says
                why, and what to do.
            CipherError: The cipher failed.
        """
        values, holder = [*row], None
        for index, column in _SECRETS_IN_A_ROW:
            value = values[index]
            if value is not None and value[:_MARK_LENGTH] == MARK:
                holder = holder or self._holder(*values[:_HOLDER_LENGTH])
                values[index] = self._opened(value, column, holder, row)
        return TokenRecord(*values)

    def _key_id(self) -> str | None:
        cipher = self._cipher
        if cipher is None:
            return None
        try:
            key_id = cipher.key_id
            if key_id is None or _KEY_ID.fullmatch(key_id):
                return key_id
        except Exception as error:  # noqa: BLE001 - a cipher raises what it likes
            failure: ZohoOrmStoreError = _failure_of(cipher, "key_id", "name its key", error)
        else:
            failure = ConfigurationError(
                f"The key id of the cipher {type(cipher).__name__} cannot be stored. "
                "It may have up to 64 letters, digits and _.:/- characters."
            )
        raise failure

    def _sealed(self, value: str, column: str, holder: bytes, key_id: str) -> str:
        cipher = cast("TokenCipher", self._cipher)
        try:
            ciphertext = cipher.encrypt(_place(column, holder) + value.encode(), key_id)
            if ciphertext.isascii() and 0 < len(ciphertext) <= _LONGEST_CIPHERTEXT:
                return prefix_of(key_id) + ciphertext
        except Exception as error:  # noqa: BLE001 - a cipher raises what it likes
            failure = _failure_of(cipher, "encrypt", f"encrypt the {column}", error)
        else:
            failure = CipherError(
                f"What {type(cipher).__name__}.encrypt makes of the {column} cannot be stored. "
                f"It must be ASCII text, of {_LONGEST_CIPHERTEXT:,} characters at most."
            )
        raise failure

    def _opened(self, value: str, column: str, holder: bytes, row: Sequence[Any]) -> str:
        key_id, separator, ciphertext = value[_MARK_LENGTH:].partition("$")
        if separator and not key_id:
            return ciphertext
        if not _KEY_ID.fullmatch(key_id):
            raise _undecryptable(row, column, "is garbled", _CHANGED)
        if self._cipher is None:
            raise _undecryptable(row, column, f"is encrypted under the key {key_id!r}", _NO_KEYS)
        try:
            plaintext = self._cipher.decrypt(ciphertext, key_id)
        except LookupError:
            problem = f"is encrypted under the key {key_id!r}, which is not among those given"
            failure: CipherError = _undecryptable(row, column, problem, _MISSING_KEY)
        except ValueError:
            failure = _garbled(row, column)
        except Exception as error:  # noqa: BLE001 - a cipher raises what it likes
            failure = _failure_to_decrypt(self._cipher, row, column, error)
        else:
            try:
                if plaintext is not None and compare_digest(
                    plaintext[:_PLACE_BYTES], _place(column, holder)
                ):
                    return plaintext[_PLACE_BYTES:].decode()
                failure = _garbled(row, column)
            except Exception as error:  # noqa: BLE001 - no bytes, or no text
                failure = _failure_to_decrypt(self._cipher, row, column, error)
        raise failure

    def _holder(self, id_: str | None, user_name: str | None, client_id: str | None) -> bytes:
        return framed(id_ or "", user_name or "", client_id or "") + self._fence


PLAIN = Vault(None)
"""Keeps plain text."""

_NO_KEYS = f"Pass cipher=FernetCipher(keys); on the command line, set {KEYS_VARIABLE}."
_MISSING_KEY = (
    "Add that key after the first one. If it is lost, delete the token "
    "(zoho-orm-store delete ID) and let its user log in again."
)
_CHANGED = (
    "If it is a tenant's, pass scope=. Otherwise its row was changed by other means than this "
    "package: restore it from a backup, or delete it (zoho-orm-store delete ID) and let its user "
    "log in again."
)


def _literal(value: str | None) -> str | None:
    """Plain text as it is stored, which must not look encrypted."""
    return prefix_of("") + value if value is not None and value.startswith(MARK) else value


def _place(column: str, holder: bytes) -> bytes:
    return sha256(_COLUMN_FRAMED[column] + holder).digest()


def _garbled(row: Sequence[Any], column: str) -> UndecryptableTokenError:
    return _undecryptable(row, column, "is garbled, or is another token's", _CHANGED)


def misplaced(record: TokenRecord) -> UndecryptableTokenError:
    """Why a token cannot be bound to the place that it is in, which is not this scope's."""
    row = [getattr(record, name) for name in TokenRecord.__match_args__]
    return _undecryptable(row, "identity", "is that of another scope or token", _CHANGED)


def _undecryptable(
    row: Sequence[Any], column: str, problem: str, cure: str
) -> UndecryptableTokenError:
    without_secrets = replace(TokenRecord(*row), **dict.fromkeys(SECRET_COLUMNS))
    id_ = without_secrets.id
    return UndecryptableTokenError(
        f"The {column} of the token with id {id_!r} {problem}. {cure}", id_ or "", without_secrets
    )


def _failure_to_decrypt(
    cipher: TokenCipher, row: Sequence[Any], column: str, error: Exception
) -> CipherError:
    task = f"decrypt the {column} of the token with id {row[0]!r}"
    if isinstance(error, KeysUnavailableError):
        return CipherError(f"Cannot {task}. {error}")
    return _failure_of(cipher, "decrypt", task, error)


def _failure_of(cipher: TokenCipher, member: str, task: str, error: Exception) -> CipherError:
    name = type(cipher).__name__
    return CipherError(
        f"The cipher {name} failed with {type(error).__name__} when it was to {task}. The error's "
        f"text is left out here, since it may hold a secret: use {name}.{member} by itself to "
        "read it."
    )


def _fernet() -> type[Fernet]:
    try:
        from cryptography.fernet import Fernet
    except ModuleNotFoundError:
        problem = MissingDependencyError("cryptography", "encryption")
    else:
        return Fernet
    raise problem


@cache
def _invalid_token() -> type[Exception]:
    from cryptography.fernet import InvalidToken

    return InvalidToken


def _from_environment() -> str:
    return os.environ.get(KEYS_VARIABLE, "")


def _ring_of(given: object) -> tuple[dict[str, Fernet], str]:
    """The keys by their ids, in their order, or what is wrong with them."""
    fernet, ring = _fernet(), {}
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
            return {}, f"{which} is no Fernet key, 44 characters of URL-safe base64. {_MAKE_ONE}"
        ring[hash_of("key", key.hex()).hex()[:_ID_LENGTH]] = fernet(urlsafe_b64encode(key))
    return ring, ""


_MAKE_ONE = "Make one with: zoho-orm-store keys generate"
_ID_LENGTH = 12


def _key_bytes(text: object) -> bytes | None:
    if not isinstance(text, str | bytes):
        return None
    try:
        key = urlsafe_b64decode(text)
    except ValueError:
        return None
    return key if len(key) == 32 and len(text) == 44 else None
