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
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal, NamedTuple, TextIO, TypeAlias, TypeVar

from sqlalchemy import column, inspect, select
from sqlalchemy import table as table_clause

from zoho_orm_store._adding import NewTokens
from zoho_orm_store._database.database import open_database
from zoho_orm_store._database.errors import our_errors
from zoho_orm_store._digests import hash_of
from zoho_orm_store._matching import identity_of, lookups_to_save, merged, without_earlier_pair
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

T = TypeVar("T")

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

_SDK_LENGTHS = (len(SDK_COLUMNS) - 1, len(SDK_COLUMNS))

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

_HEADER_NAMES = {*FILE_HEADER, *SDK_COLUMNS, *_FIRST_HEADER}

Outcome: TypeAlias = Literal["added", "updated", "unchanged"]

_BATCH = 500
_MOST_REFUSED = 1000
_LONGEST_LINE = 2**20
"""In characters; the longest token that can be stored takes a fraction of it."""
_NAMED = 100
"""How many ids one log record names."""


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

    Its first line may be missing: the number of columns tells the file's age.

    Args:
        path: The file, usually ``sdk_tokens.txt``.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __iter__(self) -> Iterator[Found]:
        """Yield each token, in the order of the lines.

        Raises:
            ConfigurationError: The file cannot be read, or is not one of the ``FileStore``.
        """
        try:
            # A byte-order mark is skipped, and bytes that are not UTF-8 are refused line by line.
            with self._path.open(
                newline="", encoding="utf-8-sig", errors="surrogateescape"
            ) as file:
                yield from self._read(file)
        except ZohoOrmStoreError:
            raise
        except (OSError, ValueError) as error:  # A path that contains NUL is a ValueError.
            reason = getattr(error, "strerror", None) or error
            problem = ConfigurationError(f"Cannot read {self._path}: {reason}.")
            raise without_frames(problem) from None

    def _read(self, file: TextIO) -> Iterator[Found]:
        lines = csv.reader(self._bounded_lines(file))
        read: Callable[[str, Sequence[str]], Found] | None = None
        while True:
            try:
                values = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if read is None:
                    raise self._is_foreign("its first line cannot be read") from None
                yield Found(f"line {lines.line_num}", None, f"{error}.")
                continue
            if read is None and values:
                read = self._reader_for(values)
                if _HEADER_NAMES.issuperset(values):
                    continue
            if read is not None and values:
                yield read(f"line {lines.line_num}", values)

    def _bounded_lines(self, file: TextIO) -> Iterator[str]:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise self._is_foreign(f"a line is longer than {_LONGEST_LINE - 1} characters")
            yield line

    def _reader_for(self, first: Sequence[str]) -> Callable[[str, Sequence[str]], Found]:
        """How to read the lines of a file whose first line, a header or a token, is this."""
        if any("\0" in value for value in first):
            raise self._is_foreign("its first line is not text in UTF-8")
        is_first_generation = len(first) == len(_FIRST_HEADER)
        if not is_first_generation and len(first) not in _SDK_LENGTHS:
            raise self._is_foreign(
                f"the number of columns in its first line is {len(first)} instead of ten or nine"
            )
        columns = _FIRST_HEADER if is_first_generation else SDK_COLUMNS
        try:
            if not _HEADER_NAMES.issuperset(first):
                parse_expiry(dict(zip(columns, first, strict=False))["expiry_time"])
        except InvalidTokenError:
            raise self._is_foreign(
                "its first line is neither the header nor a token: the expiry time is not a number"
            ) from None
        return _found_in_first_file if is_first_generation else _found

    def _is_foreign(self, reason: str) -> ConfigurationError:
        return without_frames(
            ConfigurationError(f"{self._path} is not a file of the SDK's FileStore: {reason}.")
        )


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
    if len(values) not in _SDK_LENGTHS:
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
        renumbered: Each id of the source under which the token cannot be found now, and the id
            that it has instead.
    """

    added: int
    updated: int
    unchanged: int
    refused: tuple[str, ...]
    renumbered: tuple[tuple[str, str], ...] = ()


@dataclass
class _Tally:
    """What has become of tokens so far."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    renumbered: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.outcomes.total() + len(self.refused)

    def add(self, other: _Tally) -> None:
        self.outcomes += other.outcomes
        self.refused += other.refused
        self.renumbered |= other.renumbered

    def summary(self) -> ImportSummary:
        added, updated, unchanged = (
            self.outcomes[outcome] for outcome in ("added", "updated", "unchanged")
        )
        renumbered = tuple(self.renumbered.items())
        return ImportSummary(added, updated, unchanged, tuple(self.refused), renumbered)


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
    imported = _Tally()

    def save_all(connection: Connection, tokens: Iterable[Found]) -> _Tally:
        tally = _Tally()
        for batch in _batches(tokens):
            added = _add_new(connection, operations, batch)
            for place, found in enumerate(batch):
                _save(connection, operations, found, added.get(place), tally)
                if strict and tally.refused:
                    raise InvalidTokenError(f"Nothing was imported, because of {tally.refused[0]}")
                if len(imported.refused) + len(tally.refused) >= _MOST_REFUSED:
                    return tally
            on_progress(imported.number + tally.number)
        return tally

    with closing(open_database(bind, timeout=None, retry_for=30.0)) as database:
        if dry_run:
            imported.add(database.rehearse(save_all, source))
        else:
            for tokens in [source] if strict else _batches(source):
                imported.add(database.write(save_all, tokens))
                if len(imported.refused) >= _MOST_REFUSED:
                    break
    if len(imported.refused) >= _MOST_REFUSED:
        raise InvalidTokenError(_too_many(imported, dry_run=dry_run))
    return imported.summary()


def _too_many(imported: _Tally, *, dry_run: bool) -> str:
    saved = imported.outcomes.total()
    done = "A dry run imports nothing" if dry_run else f"Tokens imported before that: {saved}"
    return (
        f"Reading was stopped at the token number {imported.number}, because "
        f"{len(imported.refused)} tokens cannot be imported. {done}. "
        f"The first of them is {imported.refused[0]}"
    )


def _batches(source: Iterable[Found]) -> Iterator[list[Found]]:
    tokens = iter(source)
    while batch := list(islice(tokens, _BATCH)):
        yield batch


def _add_new(
    connection: Connection, operations: TokenOperations, batch: Sequence[Found]
) -> dict[int, TokenRecord]:
    """Save those tokens of a batch that are certainly new; return their rows by their places.

    To look each of them up by all of its values would take most of the time.
    """
    records = {place: each.record for place, each in enumerate(batch) if each.record is not None}
    rows = NewTokens(operations).add(connection, [*records.values()])
    return {place: row for place, row in zip(records, rows, strict=True) if row is not None}


def _save(
    connection: Connection,
    operations: TokenOperations,
    found: Found,
    added: TokenRecord | None,
    tally: _Tally,
) -> None:
    if found.record is None:
        tally.refused.append(f"{found.where}: {found.problem}")
        return
    try:
        if added is not None:
            outcome: Outcome = "added"
            id_ = added.id
        else:
            outcome, id_ = _save_record(connection, operations, found.record)
    except InvalidTokenError as error:
        tally.refused.append(f"{found.where}: {error}")
        return
    tally.outcomes[outcome] += 1
    if found.record.id is not None and id_ is not None and id_ != found.record.id:
        tally.renumbered[found.record.id] = id_


def _save_record(
    connection: Connection, operations: TokenOperations, record: TokenRecord
) -> tuple[Outcome, str | None]:
    """Save a token, and return its id."""
    asked = replace(record, id=None)
    stored = operations.match(connection, asked, lookups_to_save(asked))
    if stored is None:
        ids = (record.id, _id_instead(operations, record))
        free = (id_ for id_ in ids if id_ and operations.get(connection, id_) is None)
        asked = replace(record, id=next(free, None))
        return "added", operations.save(connection, asked, reconcile=without_earlier_pair).id
    asked = without_earlier_pair(asked, stored)
    if merged(stored, asked) == stored:
        return "unchanged", stored.id
    asked = replace(asked, id=stored.id)
    return "updated", operations.save(connection, asked, reconcile=without_earlier_pair).id


def _id_instead(operations: TokenOperations, record: TokenRecord) -> str | None:
    """The id for a token whose own is taken: a dry run names the same one as the import."""
    if record.id is None:
        return None
    kind, value, client_id = identity_of(record)
    return hash_of("import", kind, value, client_id or "", *operations.scope.parts)[:32]


@our_errors
def export_tokens(
    bind: Bind,
    path: str | Path,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    cipher: TokenCipher | None = None,
    on_renumbered: Callable[[str, str], object] = lambda old, new: None,
    on_progress: Callable[[int], object] = lambda done: None,
) -> int:
    """Write every token into a new file that the SDK's ``FileStore`` can read, and go on with.

    The secrets in it are plain text. Only its owner can read the file. A token that another program
    made unreadable is logged and left out. The ``FileStore`` needs whole numbers as ids: every
    other id is changed in the file, and the log, at the level WARNING, names the old and the new.

    Args:
        bind: The database.
        path: The file, which must not exist.
        model: The model whose table holds the tokens.
        scope: The tenant whose tokens are exported.
        cipher: Decrypts the tokens.
        on_renumbered: Called at the end with the old and the new id of each token whose id is
            another one in the file.
        on_progress: Called after each batch with the number of tokens written so far.

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
    with (
        os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file,
        TemporaryFile("w+", newline="", encoding="utf-8") as renumbered,
    ):
        try:
            with closing(open_database(bind, timeout=None, retry_for=30.0)) as database:
                number = database.read(_write_all, operations, file, renumbered, on_progress)
        except BaseException:
            Path(path).unlink()
            raise
        _tell_renumbered(renumbered, on_renumbered)
    return number


def _write_all(
    connection: Connection,
    operations: TokenOperations,
    file: TextIO,
    renumbered: TextIO,
    on_progress: Callable[[int], object],
) -> int:
    """Write the file, and the ids that differ in it; return the number of tokens."""
    for each in (file, renumbered):
        each.seek(0)
        each.truncate()
    pages = _pages(lambda after: operations.ids(connection, after, _BATCH), lambda id_: id_)
    last_id = max((int(id_) for ids in pages for id_ in ids if _is_whole_number(id_)), default=0)
    writer, changes = csv.writer(file), csv.writer(renumbered)
    writer.writerow(FILE_HEADER)
    number = 0
    for page in _pages(
        lambda after: operations.page(connection, Filters(), after, _BATCH),
        lambda record: record.id or "",
    ):
        for record in page:
            if isinstance(record, UndecryptableTokenError):
                raise record
            if isinstance(record, UnreadableTokenError):
                logger.error("A token was not exported. %s", record)
                continue
            values = [getattr(record, name) for name in SDK_COLUMNS]
            if not _is_whole_number(record.id or ""):
                last_id += 1
                values[0] = str(last_id)
                changes.writerow((record.id, last_id))
            writer.writerow(["" if value is None else value for value in values])
            number += 1
        on_progress(number)
    return number


def _pages(read: Callable[[str], Sequence[T]], id_of: Callable[[T], str]) -> Iterator[Sequence[T]]:
    """The pages of a table in the order of ids, each read with the last id of the one before."""
    after = ""
    while page := read(after):
        yield page
        after = id_of(page[-1])


def _is_whole_number(id_: str) -> bool:
    return id_.isascii() and id_.isdigit()


def _tell_renumbered(file: TextIO, on_renumbered: Callable[[str, str], object]) -> None:
    """Log the ids that differ in an exported file, and pass each on."""
    file.seek(0)
    changes = ((row[0], row[1]) for row in csv.reader(file))
    while batch := list(islice(changes, _NAMED)):
        logger.warning(
            "Tokens got new ids in the exported file, because the FileStore needs whole numbers: "
            "%s.",
            ", ".join(f"{old!r} is now {new!r}" for old, new in batch),
        )
        for old, new in batch:
            on_renumbered(old, new)
