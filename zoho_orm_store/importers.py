"""Taking over the tokens that the SDK's own stores have kept, and giving them back.

A source is read token by token, as often as it is iterated. `import_tokens` saves what it finds
by the same rules as a store, except that an id alone proves nothing: two files number their
tokens alike.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from sqlalchemy import column, inspect, select
from sqlalchemy import table as table_clause

from zoho_orm_store.binding import bind_to
from zoho_orm_store.cipher import PLAIN, Vault
from zoho_orm_store.errors import (
    ConfigurationError,
    InvalidTokenError,
    UndecryptableTokenError,
    ZohoOrmStoreError,
    without_frames,
)
from zoho_orm_store.matching import merged, rungs_to_save, without_earlier_pair
from zoho_orm_store.models import StoredToken
from zoho_orm_store.record import TokenRecord, parse_expiry
from zoho_orm_store.repository import SyncTokenRepository
from zoho_orm_store.statements import SDK_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import NoReturn

    from sqlalchemy import Connection

    from zoho_orm_store.cipher import TokenCipher
    from zoho_orm_store.engines import Bind
    from zoho_orm_store.models import StoredTokenMixin

__all__ = [
    "FileStoreFile",
    "Found",
    "ImportSummary",
    "TokenTable",
    "export_tokens",
    "import_tokens",
]

FILE_HEADER = (*SDK_COLUMNS[:8], "redirect_uri", "api_domain")
"""The first line of the SDK's ``FileStore``, which names the redirect URL otherwise."""

Outcome: TypeAlias = Literal["added", "updated", "unchanged", "refused"]

_BATCH = 500


@dataclass(frozen=True)
class Found:
    """A token in a source, or why there is none.

    Attributes:
        where: Its place, such as ``"line 7"``.
        record: The token.
        problem: Why it cannot be read.
    """

    where: str
    record: TokenRecord | None
    problem: str | None = None


class FileStoreFile:
    """A file of the SDK's ``FileStore``, with ten columns or, in an older one, nine.

    Args:
        path: The file, as a rule ``sdk_tokens.txt``.
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
                next(lines, None)
                while True:
                    try:
                        values = next(lines)
                    except StopIteration:
                        return
                    except csv.Error as error:
                        yield Found(f"line {lines.line_num}", None, f"{error}.")
                    else:
                        if values:
                            yield _found(f"line {lines.line_num}", values)
        except OSError as error:
            problem = ConfigurationError(f"Cannot read {self._path}: {error.strerror}.")
        raise problem


class TokenTable:
    """A table of the SDK's ``DBStore``, of the sample SQLite store, or of this package.

    Args:
        bind: The database.
        name: The table's name.
        cipher: What decrypts the tokens in a table of this package.

    Raises:
        ConfigurationError: What is given for a cipher is none.
    """

    @without_frames
    def __init__(
        self, bind: Bind, name: str = "oauthtoken", *, cipher: TokenCipher | None = None
    ) -> None:
        self._bind = bind
        self._name = name
        self._vault = Vault(cipher)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A TokenTable may hold a password and is not pickled. Make one there.")

    def __iter__(self) -> Iterator[Found]:
        """Yield each token, in the order of the ids.

        Raises:
            ConfigurationError: The table is missing, or is no table of tokens.
            DatabaseError: The database refused or lost the operation.
        """
        with closing(bind_to(self._bind, timeout=None)) as binding:
            columns = binding.read(self._columns)
            last: object = None
            while rows := binding.read(lambda connection: self._page(connection, columns, last)):  # noqa: B023
                for row in rows:
                    yield _found(f"the row with id {row[0]!r}", row, self._vault)
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


def _found(where: str, values: Sequence[object], vault: Vault = PLAIN) -> Found:
    if len(values) not in (len(SDK_COLUMNS) - 1, len(SDK_COLUMNS)):
        return Found(where, None, f"It has {len(values)} columns instead of ten or nine.")
    fields = dict(zip(SDK_COLUMNS, values, strict=False))
    try:
        fields["expiry_time"] = parse_expiry(fields["expiry_time"])
        TokenRecord(**fields).check_types()  # type: ignore[arg-type]  # which it checks
        record = vault.opened([*fields.values()])
        record.check_storable()
    except (InvalidTokenError, UndecryptableTokenError) as error:
        return Found(where, None, str(error))
    return Found(where, record)


class ImportSummary(NamedTuple):
    """What an import has done, or with ``dry_run`` would do.

    Attributes:
        added: Tokens that are new.
        updated: Tokens that were known, and of which the source knew more or newer values.
        unchanged: Tokens of which the source knew nothing new.
        refused: What could not be imported: each place, and why.
    """

    added: int
    updated: int
    unchanged: int
    refused: tuple[str, ...]


class _UndoError(Exception):
    """Carries what was done out of a transaction that is rolled back."""

    def __init__(self, done: list[tuple[Outcome, str]]) -> None:
        self.done = done


@without_frames
def import_tokens(
    source: Iterable[Found],
    bind: Bind,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    cipher: TokenCipher | None = None,
    strict: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> ImportSummary:
    """Save the tokens of a source.

    A token that is known by its user or one of its tokens is updated, and keeps its id. A later
    access token that is stored already is kept. Every other token is added, with its id unless
    another token has it. A second import changes nothing.

    Args:
        source: A `FileStoreFile` or a `TokenTable`.
        bind: The database, whose tables must be up to date.
        model: The model whose table holds the tokens.
        scope: What fences off a tenant's tokens.
        cipher: What encrypts the tokens that are saved.
        strict: Whether one broken token keeps all others out. The import is then one transaction;
            otherwise there is one for some hundred tokens.
        dry_run: Whether to roll everything back in the end.
        on_progress: Called now and then with the number of tokens that were read so far.

    Returns:
        What was done.

    Raises:
        ConfigurationError: The source cannot be read.
        InvalidTokenError: A token is broken, with ``strict``; nothing was imported.
        DatabaseError: The database refused or lost the operation.
    """
    counted: Counter[Outcome] = Counter()
    refused: list[str] = []

    def save_all(connection: Connection, found: Iterable[Found]) -> list[tuple[Outcome, str]]:
        repository = SyncTokenRepository(connection, model=model, scope=scope, cipher=cipher)
        done = [_save(repository, each) for each in found]
        if strict and (problems := [problem for outcome, problem in done if outcome == "refused"]):
            raise InvalidTokenError(f"Nothing was imported, because of {problems[0]}")
        if dry_run:
            raise _UndoError(done)
        return done

    with closing(bind_to(bind, timeout=None, retry_for=30.0)) as binding:
        told = _Told(source, on_progress) if on_progress is not None else source
        for batch in _batches(told, whole=strict or dry_run):
            try:
                done = binding.write(lambda connection: save_all(connection, batch))  # noqa: B023
            except _UndoError as undone:
                done = undone.done
            counted.update(outcome for outcome, _ in done)
            refused += [problem for outcome, problem in done if outcome == "refused"]
    return ImportSummary(counted["added"], counted["updated"], counted["unchanged"], tuple(refused))


class _Told:
    """A source that tells how many tokens were read from it."""

    def __init__(self, source: Iterable[Found], on_progress: Callable[[int], None]) -> None:
        self._source = source
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[Found]:
        number = 0
        for number, found in enumerate(self._source, 1):
            yield found
            if number % _BATCH == 0:
                self._on_progress(number)
        if number % _BATCH:
            self._on_progress(number)


def _batches(source: Iterable[Found], *, whole: bool) -> Iterator[Iterable[Found]]:
    if whole:
        yield source
        return
    each = iter(source)
    while batch := list(islice(each, _BATCH)):
        yield batch


def _save(repository: SyncTokenRepository, found: Found) -> tuple[Outcome, str]:
    if found.record is None:
        return "refused", f"{found.where}: {found.problem}"
    record = replace(found.record, id=None)
    try:
        stored = repository._match(record, rungs_to_save(record))
        if stored is None:
            is_free = found.record.id is None or repository.get(found.record.id) is None
            repository.save(found.record if is_free else record)
            return "added", ""
        record = without_earlier_pair(record, stored)
        if merged(stored, record) == stored:
            return "unchanged", ""
        repository.save(replace(record, id=stored.id))
    except ZohoOrmStoreError as error:
        if not isinstance(error, InvalidTokenError):
            raise
        return "refused", f"{found.where}: {error}"
    return "updated", ""


@without_frames
def export_tokens(
    bind: Bind,
    path: str | Path,
    *,
    model: type[StoredTokenMixin] = StoredToken,
    scope: Mapping[str, object] | None = None,
    cipher: TokenCipher | None = None,
) -> int:
    """Write every token into a new file that the SDK's ``FileStore`` can read.

    Its secrets are plain text; only its owner can read the file.

    Args:
        bind: The database.
        path: The file, which must not be there yet.
        model: The model whose table holds the tokens.
        scope: What fences off a tenant's tokens.
        cipher: What decrypts the tokens.

    Returns:
        How many tokens there were.

    Raises:
        ConfigurationError: The file exists, or cannot be written.
        UndecryptableTokenError: No key opens one of the tokens; the file is removed again.
        DatabaseError: The database refused or lost the operation.
    """
    exclusive = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(path, exclusive, 0o600)
    except OSError as error:
        problem = ConfigurationError(f"Cannot write {path}: {error.strerror}.")
    else:

        def tokens(connection: Connection) -> SyncTokenRepository:
            return SyncTokenRepository(connection, model=model, scope=scope, cipher=cipher)

        return _export_into(descriptor, path, bind, tokens)
    raise problem


def _export_into(
    descriptor: int,
    path: str | Path,
    bind: Bind,
    tokens: Callable[[Connection], SyncTokenRepository],
) -> int:
    with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)

        def write_all(connection: Connection) -> int:
            file.seek(0)
            file.truncate()
            writer.writerow(FILE_HEADER)
            number = 0
            for record in tokens(connection).stream():
                writer.writerow(_blank_if_unknown(getattr(record, name) for name in SDK_COLUMNS))
                number += 1
            return number

        try:
            with closing(bind_to(bind, timeout=None, retry_for=30.0)) as binding:
                return binding.read(write_all)
        except BaseException:
            Path(path).unlink()
            raise


def _blank_if_unknown(values: Iterable[object]) -> list[object]:
    return ["" if value is None else value for value in values]
