"""Importing the tokens of the SDK's own stores, and exporting them again.

A source can be iterated several times, and reads one token at a time. `import_tokens` saves tokens
by the same rules as a store, except that an id alone proves nothing: two files number their tokens
alike.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO, TypeAlias

from sqlalchemy import column, inspect, select
from sqlalchemy import table as table_clause

from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._matching import lookups_to_save, merged, without_earlier_pair
from zoho_orm_store._secrets import PLAIN_TEXT, Secrets
from zoho_orm_store._tokens import Filters, TokenOperations
from zoho_orm_store.errors import (
    ConfigurationError,
    InvalidTokenError,
    UndecryptableTokenError,
    UnreadableTokenError,
    ZohoOrmStoreError,
    without_frames,
)
from zoho_orm_store.models import StoredToken
from zoho_orm_store.records import FIELDS, TokenRecord, parse_expiry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn

    from sqlalchemy import Connection

    from zoho_orm_store._database.engines import Bind
    from zoho_orm_store.encryption import TokenCipher
    from zoho_orm_store.models import StoredTokenMixin

logger = logging.getLogger("zoho_orm_store")

__all__ = [
    "FileStoreFile",
    "Found",
    "ImportSummary",
    "TokenTable",
    "export_tokens",
    "import_tokens",
]

SDK_COLUMNS = tuple(name for name, field in FIELDS.items() if field.sdk_name is not None)
"""The columns of the SDK's own table, in its order. Older tables lack the last one."""

FILE_HEADER = tuple("redirect_uri" if name == "redirect_url" else name for name in SDK_COLUMNS)
"""The first line of the SDK's ``FileStore``, which has its own name for the redirect URL."""

_FIRST_HEADER = (
    "user_mail",
    "client_id",
    "refresh_token",
    "access_token",
    "grant_token",
    "expiry_time",
)
"""The first line of a file of the SDK's first generation, which did not number its tokens."""

Outcome: TypeAlias = Literal["added", "updated", "unchanged", "refused"]

_BATCH = 500


@dataclass(frozen=True)
class Found:
    """A token in a source, or why it cannot be read.

    Attributes:
        where: Its place, such as ``"line 7"``.
        record: The token.
        problem: Why it cannot be read.
    """

    where: str
    record: TokenRecord | None
    problem: str | None = None


class FileStoreFile:
    """A file of the SDK's ``FileStore``, with ten columns or, if it is old, nine or six.

    Args:
        path: The file, usually ``sdk_tokens.txt``.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __iter__(self) -> Iterator[Found]:
        """Yield each token, in the order of the lines.

        Raises:
            ConfigurationError: The file cannot be read.
        """
        try:
            with self._path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                lines = csv.reader(file)
                is_first_generation = tuple(next(lines, ())) == _FIRST_HEADER
                while True:
                    try:
                        values = next(lines)
                    except StopIteration:
                        return
                    except csv.Error as error:
                        yield Found(f"line {lines.line_num}", None, f"{error}.")
                    else:
                        if values and is_first_generation:
                            yield _found_in_first_file(f"line {lines.line_num}", values)
                        elif values:
                            yield _found(f"line {lines.line_num}", values)
        except OSError as error:
            problem = ConfigurationError(f"Cannot read {self._path}: {error.strerror}.")
            raise without_frames(problem) from None


class TokenTable:
    """A table of the SDK's ``DBStore``, of the sample SQLite store, or of this package.

    Args:
        bind: The database.
        name: The table's name.
        cipher: Decrypts the tokens in a table of this package.

    Raises:
        ConfigurationError: The cipher is not a `TokenCipher`.
    """

    @our_errors
    def __init__(
        self, bind: Bind, name: str = "oauthtoken", *, cipher: TokenCipher | None = None
    ) -> None:
        self._bind = bind
        self._name = name
        self._secrets = Secrets(cipher)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A TokenTable may hold a password and cannot be pickled. Make another one.")

    def __iter__(self) -> Iterator[Found]:
        """Yield each token, in the order of the ids.

        Raises:
            ConfigurationError: The table is missing, or does not hold tokens.
            DatabaseError: The database refused or lost the operation.
        """
        with closing(our_errors(open_database)(self._bind)) as database:
            read = our_errors(database.read)
            columns = read(self._columns)
            last: object = None
            while rows := read(self._page, columns, last):
                for row in rows:
                    yield _found(f"the row with id {row[0]!r}", row, self._secrets)
                last = rows[-1][0]

    def _columns(self, connection: Connection) -> Sequence[str]:
        inspector = inspect(connection)
        if not inspector.has_table(self._name):
            raise ConfigurationError(f"There is no table {self._name!r} in that database.")
        present = {each["name"] for each in inspector.get_columns(self._name)}
        if missing := set(SDK_COLUMNS[:-1]) - present:
            raise ConfigurationError(
                f"The table {self._name!r} is not the Zoho SDK's: it lacks the columns "
                f"{', '.join(sorted(missing))}."
            )
        return [name for name in SDK_COLUMNS if name in present]

    def _page(
        self, connection: Connection, columns: Sequence[str], last: object
    ) -> Sequence[Sequence[object]]:
        rows = table_clause(self._name, *map(column, columns))
        page = select(*rows.c).order_by(rows.c.id).limit(_BATCH)
        if last is not None:
            page = page.where(rows.c.id > last)
        return connection.execute(page).all()


def _found(where: str, values: Sequence[object], secrets: Secrets = PLAIN_TEXT) -> Found:
    if len(values) not in (len(SDK_COLUMNS) - 1, len(SDK_COLUMNS)):
        return Found(where, None, f"It has {len(values)} columns instead of ten or nine.")
    fields = dict(zip(SDK_COLUMNS, values, strict=False))
    try:
        fields["expiry_time"] = parse_expiry(fields["expiry_time"])
        TokenRecord(**fields).check_types()  # type: ignore[arg-type]  # which it checks
        record = secrets.decrypted([*fields.values()])
        record.check_storable()
    except (InvalidTokenError, UnreadableTokenError) as error:
        return Found(where, None, str(error))
    return Found(where, record)


def _found_in_first_file(where: str, values: Sequence[object]) -> Found:
    if len(values) != len(_FIRST_HEADER):
        return Found(where, None, f"It has {len(values)} columns instead of six.")
    user_name, *known = values
    named = dict(zip(_FIRST_HEADER[1:], known, strict=True)) | {"user_name": user_name}
    return _found(where, [named.get(name) for name in SDK_COLUMNS])


class ImportSummary(NamedTuple):
    """The result of an import, or with ``dry_run`` what it would be.

    Attributes:
        added: How many tokens are new.
        updated: How many stored tokens got more or newer values.
        unchanged: How many stored tokens got nothing new.
        refused: The place of each token that could not be imported, and why.
    """

    added: int
    updated: int
    unchanged: int
    refused: tuple[str, ...]


class _UndoError(ZohoOrmStoreError):
    """Rolls a dry run's transaction back."""


@our_errors
def import_tokens(
    source: Iterable[Found],
    bind: Bind,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    cipher: TokenCipher | None = None,
    strict: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int], object] = lambda done: None,
) -> ImportSummary:
    """Save the tokens of a source.

    A token that is already stored, known by its user or one of its tokens, is updated and keeps
    its id; of two access tokens the one that expires later stays. Every other token is added, with
    its id unless another token has that id. A second import changes nothing.

    Args:
        source: A `FileStoreFile` or a `TokenTable`.
        bind: The database, whose tables must be up to date.
        model: The model whose table holds the tokens.
        scope: The tenant to import for.
        cipher: Encrypts the tokens that are saved.
        strict: Whether one broken token stops the whole import, which is then one transaction.
            Otherwise each batch of 500 tokens is one.
        dry_run: Whether to roll everything back at the end.
        on_progress: Called after each batch with the number of tokens read so far.

    Raises:
        ConfigurationError: The source cannot be read.
        InvalidTokenError: A token is broken, with ``strict``; nothing was imported.
        DatabaseError: The database refused or lost the operation.
    """
    operations = TokenOperations.of_model(model, scope, cipher)
    outcomes: list[tuple[Outcome, str]] = []

    def save_all(connection: Connection, tokens: Iterable[Found]) -> list[tuple[Outcome, str]]:
        saved: list[tuple[Outcome, str]] = []
        for batch in _batches(tokens):
            saved += [_save(connection, operations, found) for found in batch]
            on_progress(len(outcomes) + len(saved))
        problem = next((problem for _, problem in saved if problem), None)
        if strict and problem:
            raise InvalidTokenError(f"Nothing was imported, because of {problem}")
        if dry_run:
            outcomes.extend(saved)
            raise _UndoError
        return saved

    with closing(open_database(bind, timeout=None, retry_for=30.0)) as database:
        for tokens in [source] if strict or dry_run else _batches(source):
            with suppress(_UndoError):
                outcomes += database.write(save_all, tokens)
    counted = Counter(outcome for outcome, _ in outcomes)
    refused = tuple(problem for _, problem in outcomes if problem)
    return ImportSummary(counted["added"], counted["updated"], counted["unchanged"], refused)


def _batches(source: Iterable[Found]) -> Iterator[list[Found]]:
    tokens = iter(source)
    while batch := list(islice(tokens, _BATCH)):
        yield batch


def _save(connection: Connection, operations: TokenOperations, found: Found) -> tuple[Outcome, str]:
    if found.record is None:
        return "refused", f"{found.where}: {found.problem}"
    record = replace(found.record, id=None)
    try:
        stored = operations.match(connection, record, lookups_to_save(record))
        if stored is None:
            id_ = found.record.id
            is_free = id_ is None or operations.get(connection, id_) is None
            operations.save(connection, found.record if is_free else record)
            return "added", ""
        record = without_earlier_pair(record, stored)
        if merged(stored, record) == stored:
            return "unchanged", ""
        operations.save(connection, replace(record, id=stored.id))
    except InvalidTokenError as error:
        return "refused", f"{found.where}: {error}"
    return "updated", ""


@our_errors
def export_tokens(
    bind: Bind,
    path: str | Path,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    cipher: TokenCipher | None = None,
) -> int:
    """Write every token into a new file that the SDK's ``FileStore`` can read.

    The secrets in it are plain text. Only its owner can read the file. A token that another program
    made unreadable is logged and left out.

    Args:
        bind: The database.
        path: The file, which must not exist.
        model: The model whose table holds the tokens.
        scope: The tenant whose tokens are exported.
        cipher: Decrypts the tokens.

    Returns:
        The number of tokens.

    Raises:
        ConfigurationError: The file exists, or cannot be written.
        UndecryptableTokenError: A token cannot be decrypted; the file is removed again.
        DatabaseError: The database refused or lost the operation.
    """
    operations = TokenOperations.of_model(model, scope, cipher)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(f"Cannot write {path}: {error.strerror}.") from None
    with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
        try:
            with closing(open_database(bind, timeout=None, retry_for=30.0)) as database:
                return database.read(_write_all, operations, file)
        except BaseException:
            Path(path).unlink()
            raise


def _write_all(connection: Connection, operations: TokenOperations, file: TextIO) -> int:
    file.seek(0)
    file.truncate()
    writer = csv.writer(file)
    writer.writerow(FILE_HEADER)
    number, after = 0, ""
    while page := operations.page(connection, Filters(), after, _BATCH):
        for record in page:
            if isinstance(record, UndecryptableTokenError):
                raise record
            if isinstance(record, UnreadableTokenError):
                logger.error("A token was not exported. %s", record)
                continue
            values = (getattr(record, name) for name in SDK_COLUMNS)
            writer.writerow(["" if value is None else value for value in values])
            number += 1
        after = page[-1].id or ""
    return number
