"""Encrypting and decrypting a row's secrets and its user's name, bound to their row and column.

A stored value says what it is. An encrypted one is ``$zos1$<key id>$<ciphertext>``; anything else
is plain text. (Plain text that begins like an encrypted value is stored with an empty key id.)
The plaintext that a cipher encrypts begins with a digest of the value's column, id, user, client
and scope, so that a ciphertext that was copied to another place does not decrypt there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256
from hmac import compare_digest
from inspect import signature
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from zoho_orm_store._digests import UNSCOPED, DigestKey, KnownKeys, framed
from zoho_orm_store.encryption import KEYS_VARIABLE, KeysUnavailableError
from zoho_orm_store.errors import CipherError, ConfigurationError, UndecryptableTokenError
from zoho_orm_store.records import (
    ENCRYPTED,
    FIELDS,
    SECRETS,
    TokenRecord,
    read_values,
    record_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoho_orm_store._digests import Scope
    from zoho_orm_store.encryption import FernetCipher, TokenCipher

__all__ = [
    "MARK",
    "PLAIN_TEXT",
    "Secrets",
    "check_cipher",
    "is_partly_encrypted",
    "key_id_of",
    "key_of_digest",
    "misplaced",
    "partly_encrypted",
    "prefix_of",
    "unknown_key",
]

MARK = "$zos1$"
"""What an encrypted value begins with."""

_encrypted_of = attrgetter(*ENCRYPTED)
_POSITIONS = tuple((list(FIELDS).index(name), name) for name in ENCRYPTED)
_USER = list(FIELDS).index("user_name")
_BOUND_TO = 3  # id, user_name and client_id, the first values of a row
_DIGEST_BYTES = 32
_MARK_LENGTH = len(MARK)
_FRAMED_COLUMNS = {name: framed(name) for name in ENCRYPTED}
_KEY_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_LONGEST_CIPHERTEXT = 65_535 - len(f"{MARK}$") - 64
"""What fits into a MySQL TEXT column behind the longest key id."""

_NO_KEYS = f"Pass cipher=FernetCipher(keys); on the command line, set {KEYS_VARIABLE}."
_MISSING_KEY = (
    "Add that key after the first one. If it is lost, delete the token "
    "(zoho-orm-store delete ID) and let its user log in again."
)
_IN_PLAIN_TEXT = (
    "If encryption is being turned on, encrypt the tokens first (zoho-orm-store encrypt). "
    "Otherwise somebody without the keys has written it: delete it (zoho-orm-store delete ID) and "
    "let its user log in again."
)
_CHANGED = (
    "If it is a tenant's, pass scope=. Otherwise its row was changed by other means than this "
    "package: restore it from a backup, or delete it (zoho-orm-store delete ID) and let its user "
    "log in again."
)


def prefix_of(key_id: str) -> str:
    """What every value that is encrypted under a key begins with."""
    return f"{MARK}{key_id}$"


def key_id_of(stored: object) -> str | None:
    """The id of the key that a stored value is encrypted under.

    Returns:
        ``None`` for plain text, ``""`` for a garbled value that names no key.
    """
    if not isinstance(stored, str):
        return ""
    if not stored.startswith(MARK) or stored.startswith(prefix_of("")):
        return None
    key_id, separator, _ = stored[_MARK_LENGTH:].partition("$")
    return key_id if separator and _KEY_ID.fullmatch(key_id) else ""


def check_cipher(cipher: object) -> None:
    """Refuse a cipher that lacks a member of `TokenCipher`, or that is a class.

    Raises:
        ConfigurationError: The message says what to pass.
    """
    if cipher is None:
        return
    members = ("key_id", "encrypt", "decrypt")
    # On the type first: a property of the object may be slow, and may fail.
    has_all = all(hasattr(type(cipher), name) or hasattr(cipher, name) for name in members)
    if isinstance(cipher, type) or not has_all:
        given = cipher.__name__ if isinstance(cipher, type) else f"a {type(cipher).__name__}"
        raise ConfigurationError(
            f"cipher must be an object with {', '.join(members)}, such as FernetCipher(keys), "
            f"not {given}."
        )


class Secrets:
    """Turns what a cipher encrypts of a record into what is stored, and back.

    Args:
        cipher: Encrypts and decrypts. ``None`` stores plain text and reads nothing else.
        scope: The scope, to which values are bound as well.
        require: Whether a secret in plain text is refused, which somebody without the keys may
            have written.

    Raises:
        ConfigurationError: The cipher is not a `TokenCipher`, or encryption is required without
            one.
    """

    def __init__(
        self, cipher: TokenCipher | None, scope: Scope = UNSCOPED, *, require: bool = False
    ) -> None:
        check_cipher(cipher)
        if require and cipher is None:
            raise ConfigurationError("require_encryption=True needs a cipher: pass cipher=.")
        self._cipher = cipher
        self._scope = framed(*scope.parts)
        self._context = {name: str(value) for name, value in scope.values}
        self._require = require
        self._tells_context = _takes_context(cipher)
        self.digest_keys = self._digest_keys if hasattr(cipher, "digest_keys") else None
        """Returns the cipher's keys for digests; ``None`` if it has none."""

    @property
    def prefix(self) -> str | None:
        """What a value that is encrypted now begins with; ``None`` if it stays plain text."""
        key_id = self._key_id()
        return None if key_id is None else prefix_of(key_id)

    def encrypted(self, record: TokenRecord) -> dict[str, str | None]:
        """The columns of what is encrypted of a record, as they are to be stored.

        Raises:
            CipherError: The cipher failed.
            ConfigurationError: The cipher's key id cannot be stored, or the cipher does not encrypt
                although encryption is required.
        """
        key_id = self._key_id()
        values = zip(ENCRYPTED, _encrypted_of(record), strict=True)
        if key_id is None:
            if self._require:
                raise ConfigurationError(
                    "require_encryption=True needs a cipher that encrypts. This one only decrypts."
                )
            return {column: _unmistakable(value) for column, value in values}
        place = self._place(record.id, record.user_name, record.client_id)
        of_user = self._place(record.id, None, record.client_id)
        return {
            column: value
            and self._encrypt(value, column, of_user if column == "user_name" else place, key_id)
            for column, value in values
        }

    def decrypted(self, row: Sequence[Any]) -> TokenRecord:
        """The record of a stored row, its secrets in plain text.

        Args:
            row: The values of a record's fields, in their order.

        Raises:
            UnreadableTokenError: A value is not one of a token's.
            UndecryptableTokenError: A secret cannot be decrypted, or is plain text although
                encryption is required; the message says what to do.
            CipherError: The cipher failed.
        """
        values, place, holds_secret, require = read_values(row), None, False, self._require
        for position, column in _POSITIONS:
            value = values[position]
            if value and value[0] == "$" and value[:_MARK_LENGTH] == MARK:
                if position == _USER:  # It comes first: what follows is bound to the name.
                    of_user = self._place(values[0], None, values[2])
                    values[position] = self._decrypt(value, column, of_user, values)
                    continue
                holds_secret = True
                place = place or self._place(*values[:_BOUND_TO])
                values[position] = self._decrypt(value, column, place, values)
            elif require and value and position != _USER:
                raise self._planted(values, column)
        if require and not holds_secret:
            raise _undecryptable(
                values, "row", "holds no secret, and encryption is required", _IN_PLAIN_TEXT
            )
        return record_of(values)

    def _planted(self, row: Sequence[Any], column: str) -> UndecryptableTokenError:
        return _undecryptable(
            row, column, "is in plain text, and encryption is required", _IN_PLAIN_TEXT
        )

    def _key_id(self) -> str | None:
        cipher = self._cipher
        if cipher is None:
            return None
        try:
            key_id = cipher.key_id
            is_storable = key_id is None or _KEY_ID.fullmatch(key_id)
        except Exception as error:  # noqa: BLE001 - a cipher raises anything
            raise _cipher_failure(cipher, "key_id", "name its key", error) from None
        if not is_storable:
            raise ConfigurationError(
                f"The key id of the cipher {type(cipher).__name__} cannot be stored. "
                "It may have up to 64 letters, digits and _.:/- characters."
            )
        return key_id

    def _digest_keys(self) -> KnownKeys:
        cipher, current = cast("FernetCipher", self._cipher), self._key_id()
        try:
            keys = {id_: DigestKey.named(id_, key) for id_, key in cipher.digest_keys().items()}
        except Exception as error:  # noqa: BLE001 - a cipher raises anything
            raise _cipher_failure(cipher, "digest_keys", "return its keys", error) from None
        if current is not None and current not in keys:
            raise ConfigurationError(
                f"{type(cipher).__name__}.digest_keys() lacks a key for {current!r}, the key that "
                "encrypts."
            )
        others = tuple(key for id_, key in keys.items() if id_ != current)
        return KnownKeys(keys[current] if current is not None else None, others)

    def _encrypt(self, value: str, column: str, place: _Place, key_id: str) -> str:
        cipher = cast("TokenCipher", self._cipher)
        try:
            plaintext = place.associated_data(column) + value.encode()
            ciphertext = cipher.encrypt(plaintext, key_id, **self._told(place, column))
            is_storable = (
                isinstance(ciphertext, str)
                and ciphertext.isascii()
                and 0 < len(ciphertext) <= _LONGEST_CIPHERTEXT
            )
        except Exception as error:  # noqa: BLE001 - a cipher raises anything
            raise _cipher_failure(cipher, "encrypt", f"encrypt the {column}", error) from None
        if not is_storable:
            raise CipherError(
                f"What {type(cipher).__name__}.encrypt returned for the {column} cannot be stored. "
                f"It must be ASCII text of at most {_LONGEST_CIPHERTEXT:,} characters."
            )
        return prefix_of(key_id) + ciphertext

    def _decrypt(self, value: str, column: str, place: _Place, row: Sequence[Any]) -> str:
        key_id, separator, ciphertext = value[_MARK_LENGTH:].partition("$")
        if separator and not key_id:
            if self._require and column != "user_name":
                raise self._planted(row, column)
            return ciphertext
        if not _KEY_ID.fullmatch(key_id):
            raise _undecryptable(row, column, "is garbled", _CHANGED)
        encrypted = f"is encrypted under the key {key_id!r}"
        if self._cipher is None:
            raise _undecryptable(row, column, encrypted, _NO_KEYS)
        task = f"decrypt the {column} of the token with id {row[0]!r}"
        try:
            plaintext = self._cipher.decrypt(ciphertext, key_id, **self._told(place, column))
            expected = place.associated_data(column)
            if plaintext is not None and compare_digest(plaintext[:_DIGEST_BYTES], expected):
                return _text(plaintext[_DIGEST_BYTES:])
        except LookupError:
            problem = f"{encrypted}, which is not among those given"
            raise _undecryptable(row, column, problem, _MISSING_KEY) from None
        except KeysUnavailableError as error:
            raise CipherError(f"Cannot {task}. {error}") from None
        except ValueError:
            pass
        except Exception as error:  # noqa: BLE001 - a cipher raises anything
            raise _cipher_failure(self._cipher, "decrypt", task, error) from None
        raise _undecryptable(row, column, "is garbled, or is another token's", _CHANGED)

    def _told(self, place: _Place, column: str) -> dict[str, Any]:
        """The keyword arguments for a cipher that wants to know the value's place."""
        if not self._tells_context:
            return {}
        known = zip(("id", "user_name", "client_id"), place.values, strict=True)
        context = {name: value for name, value in known if value}
        return {"context": {"column": column, **context, **self._context}}

    def _place(self, *values: str | None) -> _Place:
        """Where a value is stored; a user's name is not bound to itself.

        Args:
            values: The row's id, user name and client id.
        """
        return _Place(values, framed(*(value or "" for value in values)) + self._scope)


class _Place(NamedTuple):
    """What a ciphertext is bound to, besides its column.

    Attributes:
        values: The row's id, user name and client id.
        framed: The same and the scope, as bytes.
    """

    values: tuple[str | None, ...]
    framed: bytes

    def associated_data(self, column: str) -> bytes:
        """The digest that a plaintext in a column begins with."""
        return sha256(_FRAMED_COLUMNS[column] + self.framed).digest()


def _takes_context(cipher: object) -> bool:
    """Whether a cipher wants to know the place of each value that it is given."""
    try:
        parameters = signature(cipher.encrypt).parameters  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return False
    return "context" in parameters


PLAIN_TEXT = Secrets(None)
"""Reads and writes plain text."""


def _text(plaintext: bytes) -> str:
    try:
        return plaintext.decode()
    except UnicodeDecodeError:
        raise TypeError("not UTF-8") from None


def _unmistakable(value: str | None) -> str | None:
    """Plain text as it is stored, which must not look encrypted."""
    return prefix_of("") + value if value is not None and value.startswith(MARK) else value


def is_partly_encrypted(row: Any) -> bool:  # noqa: ANN401
    """Whether some secrets of a row are encrypted and others are not, which no save makes."""
    stored = (getattr(row, name) for name in SECRETS)
    return len({key_id_of(value) is None for value in stored if value}) > 1


def partly_encrypted(record: TokenRecord) -> UndecryptableTokenError:
    """The error for a token in whose row somebody has put plain text beside encrypted secrets."""
    row = [getattr(record, name) for name in TokenRecord.__match_args__]
    return _undecryptable(row, "row", "has secrets in plain text beside encrypted ones", _CHANGED)


def key_of_digest(prefix: str, values: Sequence[object]) -> str | None:
    """The id of the key that a row's digests are under.

    Args:
        prefix: What the digests begin with.
        values: What is encrypted of the row.

    Returns:
        ``None`` if nothing of the row is encrypted under a key whose digests begin like that.
    """
    key_ids = {key_id for value in values if (key_id := key_id_of(value))}
    return next((each for each in key_ids if DigestKey.named(each, b"").prefix == prefix), None)


def unknown_key(id_: str, key_id: str) -> CipherError:
    """The error for tokens under a key that was not given, among which one was looked for.

    Args:
        id_: The id of one of them.
        key_id: The key's id.
    """
    return CipherError(
        f"The token with id {id_!r}, and perhaps others, is encrypted under the key {key_id!r}, "
        "which is not among those given. So it is not known whether it is what is asked for. "
        f"{_NO_KEYS} If no key of yours has had this id, somebody has planted the row: delete it "
        f"(zoho-orm-store delete {id_!r})."
    )


def misplaced(record: TokenRecord) -> UndecryptableTokenError:
    """The error for a token in a row that belongs to another scope or token."""
    row = [getattr(record, name) for name in TokenRecord.__match_args__]
    return _undecryptable(row, "identity", "is that of another scope or token", _CHANGED)


def _undecryptable(
    row: Sequence[Any], column: str, problem: str, remedy: str
) -> UndecryptableTokenError:
    unreadable = SECRETS if key_id_of(row[_USER]) is None else ENCRYPTED
    record = replace(TokenRecord(*row), **dict.fromkeys(unreadable))
    return UndecryptableTokenError(
        f"The {column} of the token with id {record.id!r} {problem}. {remedy}",
        record.id or "",
        record,
    )


def _cipher_failure(cipher: TokenCipher, member: str, task: str, error: Exception) -> CipherError:
    name = type(cipher).__name__
    return CipherError(
        f"The cipher {name} failed with {type(error).__name__} when asked to {task}. The error's "
        f"text is not shown, since it may hold a secret: call {name}.{member} yourself to read it."
    )
