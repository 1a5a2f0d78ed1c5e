"""The database and the tokens in it that a command works on, and the options that name them."""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, cast

import typer

import zoho_orm_store
from zoho_orm_store.cli.app import CommandLineError, env_cipher, one_line, without_passwords
from zoho_orm_store.cli.urls import checked_url, missing_file
from zoho_orm_store.errors import ConfigurationError, SchemaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeVar

    from sqlalchemy import Connection, Engine, Table
    from sqlalchemy.ext.asyncio import AsyncEngine

    from zoho_orm_store import TokenRepository
    from zoho_orm_store._database.database import Database
    from zoho_orm_store.models import RefreshLeaseMixin, StoredTokenMixin

    T = TypeVar("T")

__all__ = ["Target", "Url", "takes_target"]

P = ParamSpec("P")

_PANEL = "The tokens"

Url = Annotated[
    str,
    typer.Option(
        envvar="ZOHO_ORM_STORE_URL",
        help="The database as a SQLAlchemy URL, for example sqlite:///zohooauth.db or "
        "postgresql+psycopg://user@host/name.",
        metavar="URL",
        rich_help_panel=_PANEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        envvar="ZOHO_ORM_STORE_MODEL",
        help="Your own model of the tokens, for example myapp.models:ZohoToken.",
        metavar="MODULE:CLASS",
        rich_help_panel=_PANEL,
    ),
]
LeaseModel = Annotated[
    str | None,
    typer.Option(
        envvar="ZOHO_ORM_STORE_LEASE_MODEL",
        help="Your own model of the refresh leases.",
        metavar="MODULE:CLASS",
        rich_help_panel=_PANEL,
    ),
]
Scope = Annotated[
    list[str] | None,
    typer.Option(
        envvar="ZOHO_ORM_STORE_SCOPE",
        help="Only the tokens with this value in a column of your model, for example tenant_id=7. "
        "You can repeat it.",
        metavar="COLUMN=VALUE",
        rich_help_panel=_PANEL,
    ),
]
TableName = Annotated[
    str | None,
    typer.Option(
        "--table",
        envvar="ZOHO_ORM_STORE_TABLE",
        help="The table of the tokens, if it has the columns of oauthtoken under another name.",
        metavar="NAME",
        rich_help_panel=_PANEL,
    ),
]
Schema = Annotated[
    str | None,
    typer.Option(
        envvar="ZOHO_ORM_STORE_SCHEMA",
        help="The schema of the tables, instead of the connection's own.",
        metavar="NAME",
        rich_help_panel=_PANEL,
    ),
]


def takes_target(
    *, scope: bool = True, lease_model: bool = False
) -> Callable[[Callable[Concatenate[Target, P], None]], Callable[..., None]]:
    """Make a decorator that passes a command a `Target`, made of the options that it adds.

    Args:
        scope: Whether to add ``--scope``.
        lease_model: Whether to add ``--lease-model``.
    """
    options: dict[str, tuple[Any, Any]] = {
        "url": (Url, Parameter.empty),
        "model": (Model, None),
        **({"lease_model": (LeaseModel, None)} if lease_model else {}),
        **({"scope": (Scope, None)} if scope else {}),
        "table": (TableName, None),
        "schema": (Schema, None),
    }
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in options.items()
    ]

    def decorate(command: Callable[Concatenate[Target, P], None]) -> Callable[..., None]:
        @wraps(command)
        def run(**arguments: Any) -> None:  # noqa: ANN401
            given = {name: arguments.pop(name) for name in options}
            with closing(Target(**given)) as target:
                call = cast("Callable[..., None]", command)
                call(target, **arguments)

        own = list(signature(command, eval_str=True).parameters.values())[1:]
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own] + added
        vars(run)["__signature__"] = Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


class Target:
    """The database and the tokens in it that a command works on.

    Args:
        url: The database.
        model: The project's own model of the tokens, as ``module:Class``.
        lease_model: The project's own model of the refresh leases, as ``module:Class``.
        scope: Columns of the model and their values, each as ``column=value``.
        table: The name of a table with the columns of ``oauthtoken``, instead of a model.
        schema: The schema of the tables that name none.

    Attributes:
        model: The model of the tokens.
        lease_model: The model of the refresh leases, or ``None`` if it is not known.
        scope: The values that the tokens have in certain columns, or ``None``.
        bind: The database, as the functions of this package take it.

    Raises:
        ConfigurationError: One of them cannot be used; the message says why.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        lease_model: str | None = None,
        scope: Sequence[str] | None = None,
        table: str | None = None,
        schema: str | None = None,
    ) -> None:
        self.url = checked_url(url)
        self._engine: Engine | AsyncEngine | None = None
        self.model = self._model(model, table)
        self.lease_model = self._lease_model(lease_model, knows_schema=table is None)
        self.scope = _scope(self._tokens, scope) if scope else None
        if schema is not None:
            self._engine = self._engine_with(schema)
        self.bind: str | Engine | AsyncEngine = self._engine or self.url

    def close(self) -> None:
        """Give back the connections."""
        from sqlalchemy import Engine

        # An asynchronous engine has none: what works on it makes a copy.
        if isinstance(self._engine, Engine):
            self._engine.dispose()

    @property
    def is_standard(self) -> bool:
        """Whether the tokens are in the table that this package's migrations make."""
        return self.model is zoho_orm_store.StoredToken

    @property
    def place(self) -> str:
        """The database, without its password."""
        from sqlalchemy import make_url

        from zoho_orm_store._database.drivers import redacted_url

        return redacted_url(make_url(self.url))

    @property
    def table_name(self) -> str:
        """The name of the table of the tokens."""
        return self._tokens.fullname

    @property
    def missing_file(self) -> str | None:
        """The path of the SQLite database, if it does not exist yet."""
        return missing_file(self.url)

    @property
    def scope_parts(self) -> tuple[str, ...]:
        """What the scope adds to a digest."""
        from zoho_orm_store._scopes import scope_for

        return scope_for(self._tokens, self.scope).parts

    @property
    def options(self) -> dict[str, Any]:
        """What the functions and repositories of this package take besides the database."""
        return {"model": self.model, "scope": self.scope}

    def require_standard(self, command: str) -> None:
        """Refuse a command that only works on the tables of this package.

        Raises:
            ConfigurationError: The tokens are in another table.
        """
        if not self.is_standard:
            raise ConfigurationError(
                f"{command!r} works only on this package's own tables. The table "
                f"{self.table_name!r} belongs to your project: use its migrations "
                "(alembic upgrade head), and 'zoho-orm-store check' to see whether it is complete."
            )

    def require_file(self) -> None:
        """Refuse a SQLite database that does not exist, which connecting would create.

        Raises:
            SchemaError: It does not exist.
        """
        if self.missing_file is not None:
            make = f"create it: zoho-orm-store upgrade --url '{self.place}'"
            if not self.is_standard:
                make = "create it with your project's migrations"
            raise SchemaError(
                f"The file {self.missing_file} does not exist. Check its path, which begins at the "
                f"current folder unless it is absolute, or {make}."
            )

    def check_tables(self, database: Database, *, indexes: bool = True) -> None:
        """Check the tables, whoever made them.

        Args:
            database: The open database.
            indexes: Whether to check the indexes of a project's own tables too.

        Raises:
            SchemaError: They are missing or not up to date.
        """
        if self.is_standard:
            zoho_orm_store.provision.check(database)
        else:
            database.read(_check_table, self._tokens, indexes)
        if indexes and self.lease_model not in (None, zoho_orm_store.RefreshLease):
            self.check_lease_table(database)

    def check_lease_table(self, database: Database) -> None:
        """Check a project's own table of refresh leases, whose model is known.

        Raises:
            SchemaError: It is missing or lacks something.
        """
        database.read(_check_table, self.lease_table, True)

    def check(self) -> None:
        """Check that the tables can be used; see `check_tables`."""
        with self.open():
            pass

    @contextmanager
    def open(self, *, retry_for: float = 30.0) -> Iterator[Database]:
        """Open the database and check its tables.

        Raises:
            SchemaError: The database does not exist, or its tables are not up to date.
        """
        self.require_file()
        with self.open_unchecked(timeout=None, retry_for=retry_for) as database:
            self.check_tables(database, indexes=False)
            yield database

    @contextmanager
    def open_unchecked(self, *, timeout: float | None, retry_for: float) -> Iterator[Database]:
        """Open the database; see `open_database`."""
        from zoho_orm_store._database.database import open_database

        with closing(open_database(self.bind, timeout=timeout, retry_for=retry_for)) as database:
            yield database

    def repository(self, connection: Connection) -> TokenRepository:
        """The tokens on a connection."""
        return zoho_orm_store.TokenRepository(connection, cipher=env_cipher(), **self.options)

    def run(
        self,
        work: Callable[..., T],
        *args: object,
        writes: bool = False,
        retry_for: float = 30.0,
        **options: object,
    ) -> T:
        """Run work that takes a repository and other arguments, in a transaction."""
        with self.open(retry_for=retry_for) as database:
            run = database.write if writes else database.read
            return run(lambda connection: work(self.repository(connection), *args, **options))

    @property
    def lease_table(self) -> Table:
        """The table of the refresh leases, whose model is known."""
        from zoho_orm_store.models import lease_table

        return lease_table(cast("type[RefreshLeaseMixin]", self.lease_model))

    @property
    def _tokens(self) -> Table:
        from zoho_orm_store.models import token_table

        return token_table(self.model)

    def _model(self, model: str | None, table: str | None) -> type[StoredTokenMixin]:
        if model is not None and table is not None:
            raise CommandLineError(
                "Give either the model (--model) or its table (--table), not both."
            )
        if table is not None:
            return _standard_model(table)
        if model is None:
            return zoho_orm_store.StoredToken
        found: type[StoredTokenMixin] = _load_class(model, "--model")
        from zoho_orm_store.models import token_table

        token_table(found)
        return found

    def _lease_model(
        self, lease_model: str | None, *, knows_schema: bool
    ) -> type[RefreshLeaseMixin] | None:
        if lease_model is None:
            is_ours = self.is_standard and knows_schema
            return zoho_orm_store.RefreshLease if is_ours else None
        found: type[RefreshLeaseMixin] = _load_class(lease_model, "--lease-model")
        from zoho_orm_store.models import lease_table

        lease_table(found)
        return found

    def _engine_with(self, schema: str) -> Engine | AsyncEngine:
        """An engine for which tables without a schema are in this one."""
        from sqlalchemy import create_engine, make_url
        from sqlalchemy.ext.asyncio import create_async_engine

        from zoho_orm_store._database.database import open_database
        from zoho_orm_store._database.drivers import connect_args

        own = self._tokens.schema
        if own is not None:
            raise CommandLineError(
                f"The model {self.model.__name__} names the schema {own!r} itself. "
                "Leave --schema out."
            )
        open_database(self.url).close()  # Its errors say what is wrong with the URL.
        url = make_url(self.url)
        if url.get_backend_name() == "sqlite":
            raise CommandLineError("SQLite has no schemas. Leave --schema out.")
        dialect = url.get_dialect()
        make: Callable[..., Engine | AsyncEngine] = (
            create_async_engine if dialect.is_async else create_engine
        )
        return make(
            url,
            connect_args=connect_args(url, dialect.driver, 10.0),
            execution_options={"schema_translate_map": {None: schema}},
            hide_parameters=True,
        )


# -- Models ---------------------------------------------------------------------------------------


def _load_class(text: str, option: str) -> Any:  # noqa: ANN401 - the caller checks it
    """Import the class that an option names."""
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        guess = ""
        if "." in text and ":" not in text:
            guess = f" Did you mean {':'.join(text.rsplit('.', 1))!r}?"
        raise CommandLineError(
            f"{option} takes MODULE:CLASS, such as myapp.models:ZohoToken, not {text!r}.{guess}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if not f"{module_name}.".startswith(f"{missing}."):
            raise ConfigurationError(
                f"Importing {module_name!r} failed: it needs the module {missing!r}, which is not "
                "installed."
            ) from None
        nearest = _nearest_module(missing)
        guess = f"Did you mean '{nearest}{module_name[len(missing) :]}:{name}'?"
        raise CommandLineError(
            f"There is no module {missing!r} in the current folder or in this Python. "
            + (guess if nearest else "Run this where your project can be imported.")
        ) from None
    except Exception as error:  # noqa: BLE001 - a project's module may raise anything
        reason = without_passwords(one_line(error))
        raise ConfigurationError(
            f"Importing {module_name!r} failed: {type(error).__name__}: {reason}"
        ) from None
    found = getattr(module, name, None)
    if found is None:
        models = [each for each, value in vars(module).items() if hasattr(value, "__tablename__")]
        nearest = next(iter(get_close_matches(name, models, 1)), None)
        guess = f" Its models are {', '.join(models)}." if models else ""
        if nearest:
            guess = f" Did you mean '{module_name}:{nearest}'?"
        raise CommandLineError(f"The module {module_name!r} has no class {name!r}.{guess}")
    return found


def _nearest_module(missing: str) -> str | None:
    """The existing module with the name that is most like a missing one's."""
    parent, dot, last = missing.rpartition(".")
    path = list(import_module(parent).__path__) if parent else None
    names = [module.name for module in iter_modules(path)]
    if not parent:
        names += [entry.name for entry in Path.cwd().iterdir() if entry.is_dir()]
    nearest = get_close_matches(last, names, 1)
    return f"{parent}{dot}{nearest[0]}" if nearest else None


def _standard_model(table: str) -> type[StoredTokenMixin]:
    """A model of a table with the columns of ``oauthtoken``."""
    from sqlalchemy import MetaData
    from sqlalchemy.orm import DeclarativeBase

    if table == zoho_orm_store.StoredToken.__tablename__:
        return zoho_orm_store.StoredToken
    base = type("Base", (DeclarativeBase,), {"metadata": MetaData()})
    return type("Tokens", (zoho_orm_store.StoredTokenMixin, base), {"__tablename__": table})


def _check_table(connection: Connection, table: Table, indexes: bool) -> None:
    """Refuse a project's own table that lacks what its model has.

    Raises:
        SchemaError: The message names what is missing.
    """
    import warnings

    from sqlalchemy import inspect
    from sqlalchemy.exc import SAWarning

    translated: Mapping[str | None, str | None] = (
        connection.get_execution_options().get("schema_translate_map") or {}
    )
    schema, inspector = translated.get(table.schema, table.schema), inspect(connection)
    cure = "Make it with your project's migrations (alembic upgrade head)."
    if not inspector.has_table(table.name, schema=schema):
        raise SchemaError(f"The table {table.fullname!r} does not exist. {cure}")
    with warnings.catch_warnings():
        # It does not matter here if a project has columns of a type that SQLAlchemy does not know.
        warnings.simplefilter("ignore", SAWarning)
        columns = {each["name"] for each in inspector.get_columns(table.name, schema=schema)}
        found: list[list[str | None]] = [
            each["column_names"] for each in inspector.get_indexes(table.name, schema=schema)
        ]
        for unique in inspector.get_unique_constraints(table.name, schema=schema):
            found.append([*unique["column_names"]])
    lacking = [f"the column {each.name}" for each in table.columns if each.name not in columns]
    if indexes and not lacking:
        lacking = [
            f"the index on {', '.join(index.columns.keys())}"
            for index in sorted(table.indexes, key=lambda index: str(index.name))
            if index.columns.keys() not in found
        ]
    if lacking:
        raise SchemaError(f"The table {table.fullname!r} lacks {', '.join(lacking)}. {cure}")


# -- Scopes ---------------------------------------------------------------------------------------


def _scope(table: Table, given: Sequence[str]) -> dict[str, object]:
    """The columns that a scope names, with values of the columns' Python types.

    Raises:
        CommandLineError: One is not of the form ``column=value``, or not of the column's type.
        ConfigurationError: The table has no such column.
    """
    from zoho_orm_store._scopes import scope_for

    scope: dict[str, object] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not name or not equals:
            raise CommandLineError(
                f"--scope takes COLUMN=VALUE, such as tenant_id=7, not {each!r}."
            )
        scope[name] = text
        if table is zoho_orm_store.StoredToken.__table__ and name not in table.c:
            raise CommandLineError(
                f"The table {table.name!r} has no column {name!r}: --scope is for a model of your "
                "own that has one. Name it with --model MODULE:CLASS."
            )
        if name in table.c:
            scope[name] = _value(name, text, table.c[name].type)
    scope_for(table, scope)
    return scope


def _value(name: str, text: str, column_type: Any) -> object:  # noqa: ANN401
    """A text as a value of a column's Python type."""
    import datetime
    import enum
    import uuid

    try:
        wanted = column_type.python_type
    except NotImplementedError:  # A type of the project's own.
        return text
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if issubclass(wanted, enum.Enum):
            return wanted[text]
        if wanted in (datetime.date, datetime.datetime, datetime.time):
            return wanted.fromisoformat(text)
        if wanted is uuid.UUID:
            return uuid.UUID(text)
        return wanted(text)
    except (ValueError, KeyError, TypeError, ArithmeticError):
        raise CommandLineError(
            f"--scope: the column {name!r} holds values of the type {wanted.__name__}, and "
            f"{text!r} is not one."
        ) from None
