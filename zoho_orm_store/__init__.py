"""Keep the Zoho CRM SDK's OAuth tokens in a SQLAlchemy database.

Every public name is imported when it is first used, so that `import zoho_orm_store` loads neither
the Zoho SDK nor Alembic, and a migration job or an async web process does not need the SDK.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoho_orm_store import provision as provision
    from zoho_orm_store.cipher import FernetCipher, TokenCipher
    from zoho_orm_store.errors import (
        CipherError,
        ConfigurationError,
        DatabaseError,
        DatabaseTimeoutError,
        DatabaseUnreachableError,
        InvalidTokenError,
        MissingDependencyError,
        RefreshFailedError,
        SchemaError,
        StoreClosedError,
        UndecryptableTokenError,
        UserMismatchError,
        ZohoOrmStoreError,
    )
    from zoho_orm_store.memory import MemoryTokenStore
    from zoho_orm_store.models import (
        RefreshLease,
        RefreshLeaseMixin,
        StoredToken,
        StoredTokenMixin,
        metadata,
    )
    from zoho_orm_store.record import TokenRecord
    from zoho_orm_store.refresh import RefreshPolicy
    from zoho_orm_store.repository import SyncTokenRepository, TokenRepository
    from zoho_orm_store.store import SQLAlchemyTokenStore

__version__ = "0.1.0"

__all__ = [
    "CipherError",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseTimeoutError",
    "DatabaseUnreachableError",
    "FernetCipher",
    "InvalidTokenError",
    "MemoryTokenStore",
    "MissingDependencyError",
    "RefreshFailedError",
    "RefreshLease",
    "RefreshLeaseMixin",
    "RefreshPolicy",
    "SQLAlchemyTokenStore",
    "SchemaError",
    "StoreClosedError",
    "StoredToken",
    "StoredTokenMixin",
    "SyncTokenRepository",
    "TokenCipher",
    "TokenRecord",
    "TokenRepository",
    "UndecryptableTokenError",
    "UserMismatchError",
    "ZohoOrmStoreError",
    "metadata",
    "provision",
]

_MODULES = {
    "cipher": ("FernetCipher", "TokenCipher"),
    "errors": (
        "CipherError",
        "ConfigurationError",
        "DatabaseError",
        "DatabaseTimeoutError",
        "DatabaseUnreachableError",
        "InvalidTokenError",
        "MissingDependencyError",
        "RefreshFailedError",
        "SchemaError",
        "StoreClosedError",
        "UndecryptableTokenError",
        "UserMismatchError",
        "ZohoOrmStoreError",
    ),
    "memory": ("MemoryTokenStore",),
    "models": (
        "RefreshLease",
        "RefreshLeaseMixin",
        "StoredToken",
        "StoredTokenMixin",
        "metadata",
    ),
    "record": ("TokenRecord",),
    "refresh": ("RefreshPolicy",),
    "repository": ("SyncTokenRepository", "TokenRepository"),
    "store": ("SQLAlchemyTokenStore",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "provision":
        return import_module("zoho_orm_store.provision")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"zoho_orm_store.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
