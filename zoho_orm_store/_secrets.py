"""Encrypting and decrypting a row's secrets, bound to their row and column.

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
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from zoho_orm_store._digests import framed
from zoho_orm_store.encryption import KEYS_VARIABLE, KeysUnavailableError
from zoho_orm_store.errors import CipherError, ConfigurationError, UndecryptableTokenError
from zoho_orm_store.records import FIELDS, SECRETS, TokenRecord, read_values, record_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoho_orm_store.encryption import TokenCipher

__all__ = [
    "MARK",
    "PLAIN_TEXT",
    "Secrets",
    "check_cipher",
    "key_id_of",
    "misplaced",
    "prefix_of",
]

MARK = "$zos1$"
"""What an encrypted value begins with."""

_secrets_of = attrgetter(*SECRETS)
_POSITIONS = tuple((list(FIELDS).index(name), name) for name in SECRETS)
_BOUND_TO = 3  # id, user_name and client_id, the first values of a row
_DIGEST_BYTES = 32
_MARK_LENGTH = len(MARK)
_FRAMED_COLUMNS = {name: framed(name) for name in SECRETS}
_KEY_ID = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_LONGEST_CIPHERTEXT = 65_535 - len(f"{MARK}$") - 64
"""What fits into a MySQL TEXT column behind the longest key id."""

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
    """Turns the secrets of a record into what is stored, and back.

    Args:
        cipher: Encrypts and decrypts. ``None`` stores plain text and reads nothing else.
        scope_parts: The scope, to which values are bound as well.

    Raises:
        ConfigurationError: The cipher is not a `TokenCipher`.
    """

    def __init__(self, cipher: TokenCipher | None, scope_parts: tuple[str, ...] = ()) -> None:
        check_cipher(cipher)
        self._cipher = cipher
        self._scope = framed(*scope_parts)

    @property
    def prefix(self) -> str | None:
        """What a value that is encrypted now begins with; ``None`` if it stays plain text."""
        key_id = self._key_id()
        return None if key_id is None else prefix_of(key_id)

    def encrypted(self, record: TokenRecord) -> dict[str, str | None]:
        """The columns of a record's secrets, as they are to be stored.

        Raises:
            CipherError: The cipher failed.
            ConfigurationError: The cipher's key id cannot be stored.
        """
        key_id = self._key_id()
        values = zip(SECRETS, _secrets_of(record), strict=True)
        if key_id is None:
            return {column: _unmistakable(value) for column, value in values}
        row = self._framed_row(record.id, record.user_name, record.client_id)
        return {
            column: None if value is None else self._encrypt(value, column, row, key_id)
            for column, value in values
        }

    def decrypted(self, row: Sequence[Any]) -> TokenRecord:
        """The record of a stored row, its secrets in plain text.

        Args:
            row: The values of a record's fields, in their order.

        Raises:
            UnreadableTokenError: A value is not one of a token's.
            UndecryptableTokenError: A secret cannot be decrypted; the message says why, and what
                to do.
            CipherError: The cipher failed.
        """
        values, framed_row = read_values(row), b""
        for position, column in _POSITIONS:
            value = values[position]
            if value and value[0] == "$" and value[:_MARK_LENGTH] == MARK:
                framed_row = framed_row or self._framed_row(*values[:_BOUND_TO])
                values[position] = self._decrypt(value, column, framed_row, values)
        return record_of(values)

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

    def _encrypt(self, value: str, column: str, row: bytes, key_id: str) -> str:
        cipher = cast("TokenCipher", self._cipher)
        try:
            ciphertext = cipher.encrypt(_associated_data(column, row) + value.encode(), key_id)
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

    def _decrypt(self, value: str, column: str, framed_row: bytes, row: Sequence[Any]) -> str:
        key_id, separator, ciphertext = value[_MARK_LENGTH:].partition("$")
        if separator and not key_id:
            return ciphertext
        if not _KEY_ID.fullmatch(key_id):
            raise _undecryptable(row, column, "is garbled", _CHANGED)
        encrypted = f"is encrypted under the key {key_id!r}"
        if self._cipher is None:
            raise _undecryptable(row, column, encrypted, _NO_KEYS)
        task = f"decrypt the {column} of the token with id {row[0]!r}"
        try:
            plaintext = self._cipher.decrypt(ciphertext, key_id)
            expected = _associated_data(column, framed_row)
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

    def _framed_row(self, id_: str | None, user_name: str | None, client_id: str | None) -> bytes:
        return framed(id_ or "", user_name or "", client_id or "") + self._scope


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


def _associated_data(column: str, framed_row: bytes) -> bytes:
    return sha256(_FRAMED_COLUMNS[column] + framed_row).digest()


def misplaced(record: TokenRecord) -> UndecryptableTokenError:
    """The error for a token in a row that belongs to another scope or token."""
    row = [getattr(record, name) for name in TokenRecord.__match_args__]
    return _undecryptable(row, "identity", "is that of another scope or token", _CHANGED)


def _undecryptable(
    row: Sequence[Any], column: str, problem: str, remedy: str
) -> UndecryptableTokenError:
    record = replace(TokenRecord(*row), **dict.fromkeys(SECRETS))
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
