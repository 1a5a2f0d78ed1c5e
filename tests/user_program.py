"""An application's code around the public API, which `mypy --strict` accepts as it stands.

Each `type: ignore` marks a mistake; mypy reports it if it would not have refused that line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)
from typing_extensions import assert_type

from zoho_orm_store import (
    AsyncTokenRepository,
    DatabaseError,
    FernetCipher,
    FileStoreFile,
    MemoryTokenStore,
    RefreshLeaseMixin,
    RefreshPolicy,
    RefreshStats,
    SQLAlchemyTokenStore,
    StoredToken,
    StoredTokenMixin,
    TokenCipher,
    TokenRecord,
    TokenRepository,
    TokenTable,
    UndecryptableTokenError,
    ZohoOrmStoreError,
    export_tokens,
    generate_key,
    import_tokens,
    include_name,
    metadata,
    provision,
    rotate_keys,
)


class Base(DeclarativeBase):
    """The application's declarative base."""


class ZohoToken(StoredTokenMixin, Base):
    """Its own table of tokens, with a column for the tenant."""

    __tablename__ = "zoho_token"

    tenant_id: Mapped[int | None] = mapped_column()


class ZohoLease(RefreshLeaseMixin, Base):
    """Its own table of leases."""

    __tablename__ = "zoho_lease"


class OwnCipher:
    """A cipher of the application's own."""

    @property
    def key_id(self) -> str | None:
        return "own"

    def encrypt(self, plaintext: bytes, key_id: str) -> str:
        return plaintext.hex()

    def decrypt(self, ciphertext: str, key_id: str) -> bytes | None:
        return bytes.fromhex(ciphertext)


def stores(engine: Engine, async_engine: AsyncEngine) -> Iterator[SQLAlchemyTokenStore]:
    cipher: TokenCipher = OwnCipher()
    yield SQLAlchemyTokenStore("sqlite:///zohooauth.db")
    yield SQLAlchemyTokenStore(engine, cipher=FernetCipher(generate_key()), missing_id="raise")
    yield SQLAlchemyTokenStore(async_engine, cipher=cipher, refresh=None, timeout=5)
    store = SQLAlchemyTokenStore(
        engine,
        model=ZohoToken,
        lease_model=ZohoLease,
        scope={"tenant_id": 7},
        refresh=RefreshPolicy(lease=5, wait=10, ahead=60),
        create_schema=False,
    )
    assert_type(store.scoped(tenant_id=8), SQLAlchemyTokenStore)
    assert_type(store.refresh_stats, RefreshStats)
    yield store
    SQLAlchemyTokenStore(7)  # type: ignore[arg-type]
    SQLAlchemyTokenStore(engine, model=Base)  # type: ignore[arg-type]
    SQLAlchemyTokenStore(engine, missing_id="ignore")  # type: ignore[arg-type]
    SQLAlchemyTokenStore(engine, timeout="5")  # type: ignore[arg-type]
    SQLAlchemyTokenStore(engine, timout=5)  # type: ignore[call-arg]
    SQLAlchemyTokenStore(engine, cipher=generate_key())  # type: ignore[arg-type]


def repositories(
    store: SQLAlchemyTokenStore,
    session: Session,
    registry: scoped_session[Session],
    connection: Connection,
    async_session: AsyncSession,
    async_registry: async_scoped_session[AsyncSession],
    async_connection: AsyncConnection,
) -> None:
    assert_type(store.repository(session), TokenRepository)
    assert_type(store.repository(registry), TokenRepository)
    assert_type(store.repository(connection), TokenRepository)
    assert_type(store.repository(async_session), AsyncTokenRepository)
    assert_type(store.repository(async_registry), AsyncTokenRepository)
    assert_type(store.repository(async_connection), AsyncTokenRepository)
    TokenRepository(registry, model=ZohoToken, scope={"tenant_id": 7}, cipher=OwnCipher())
    AsyncTokenRepository(async_registry, model=ZohoToken, scope={"tenant_id": 7})


def mistaken_sessions(
    store: SQLAlchemyTokenStore,
    engine: Engine,
    factory: sessionmaker[Session],
    session: Session,
    async_session: AsyncSession,
) -> None:
    store.repository(engine)  # type: ignore[call-overload]
    store.repository(factory)  # type: ignore[call-overload]
    store.repository(None)  # type: ignore[call-overload]
    TokenRepository(engine)  # type: ignore[arg-type]
    TokenRepository(async_session)  # type: ignore[arg-type]
    AsyncTokenRepository(session)  # type: ignore[arg-type]


def synchronous(store: SQLAlchemyTokenStore) -> None:
    asked = TokenRecord(user_name="ada@example.com:1", refresh_token="1000.r", expiry_time=None)
    with store.transaction() as tokens:
        assert_type(tokens, TokenRepository)
        saved = tokens.save(asked)
        assert_type(saved, TokenRecord)
        assert_type(saved.id, "str | None")
        assert_type(tokens.get(saved.id or ""), "TokenRecord | None")
        assert_type(tokens.find(asked), "TokenRecord | None")
        assert_type(tokens.list(expired=False), Sequence[TokenRecord])
        assert_type(tokens.stream(user_name="u"), Iterator[TokenRecord])
        assert_type(tokens.count(client_id="c"), int)
        assert_type(tokens.purge(stranded=True), int)
        assert_type(tokens.delete(saved.id or ""), bool)
        assert_type(tokens.delete_all(), int)


def mistaken_arguments(tokens: TokenRepository) -> None:
    tokens.save("a token")  # type: ignore[arg-type]
    tokens.get(7)  # type: ignore[arg-type]
    tokens.list(user="u")  # type: ignore[call-arg]


async def asynchronous(tokens: AsyncTokenRepository) -> None:
    saved = await tokens.save(TokenRecord(refresh_token="1000.r"))
    assert_type(saved, TokenRecord)
    assert_type(await tokens.get(saved.id or ""), "TokenRecord | None")
    assert_type(await tokens.list(), Sequence[TokenRecord])
    assert_type(tokens.stream(), AsyncIterator[TokenRecord])
    assert_type(await tokens.count(), int)
    assert_type(await tokens.delete(saved.id or ""), bool)
    assert_type(await tokens.delete_all(), int)


def errors(store: SQLAlchemyTokenStore, asked: TokenRecord) -> str:
    try:
        with store.transaction() as tokens:
            tokens.save(asked)
    except UndecryptableTokenError as error:
        return error.id
    except DatabaseError as error:
        assert_type(error.retryable, bool)
    except (ValueError, ZohoOrmStoreError) as error:
        return str(error)
    return ""


def jobs(engine: Engine, cipher: TokenCipher) -> None:
    provision.upgrade(engine)
    provision.check(engine)
    assert_type(rotate_keys(engine, cipher, model=ZohoToken, scope={"tenant_id": 7}).rotated, int)
    import_tokens(FileStoreFile("zoho_tokens.txt"), engine, cipher=cipher)
    import_tokens(TokenTable("sqlite:///old.db"), engine, dry_run=True)
    export_tokens(engine, "sdk_tokens.txt", cipher=cipher)
    targets: dict[str, Any] = {"target_metadata": [Base.metadata, metadata]}
    assert targets["target_metadata"][1].tables["oauthtoken"] is StoredToken.__table__
    assert_type(include_name("oauthtoken", "table", {}), bool)


async def in_a_loop() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    async with async_sessionmaker(engine)() as session:
        await asynchronous(AsyncTokenRepository(session))
    await engine.dispose()


def main() -> None:
    """Run what is right of it."""
    with MemoryTokenStore(), SQLAlchemyTokenStore("sqlite://", cipher=OwnCipher()) as store:
        synchronous(store)
        assert "there is nothing to store" in errors(store, TokenRecord())
    asyncio.run(in_a_loop())
    print("done")


if __name__ == "__main__":
    main()
