"""Keep the Zoho CRM SDK's OAuth tokens in a SQLAlchemy database.

Every public name is imported when it is first used, so that `import zoho_orm_store` loads neither
the Zoho SDK, nor SQLAlchemy, Alembic or cryptography.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoho_orm_store import provision
    from zoho_orm_store.encryption import FernetCipher, TokenCipher, generate_key
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
        UnreadableTokenError,
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
    from zoho_orm_store.provision import include_name
    from zoho_orm_store.records import TokenRecord
    from zoho_orm_store.refresh import RefreshPolicy, RefreshStats
    from zoho_orm_store.repository import AsyncTokenRepository, TokenRepository
    from zoho_orm_store.rotation import rotate_keys
    from zoho_orm_store.store import SQLAlchemyTokenStore
    from zoho_orm_store.transfer import FileStoreFile, TokenTable, export_tokens, import_tokens

__version__ = "0.2.0"

__all__ = [
    "AsyncTokenRepository",
    "CipherError",
    "ConfigurationError",
    "DatabaseError",
    "DatabaseTimeoutError",
    "DatabaseUnreachableError",
    "FernetCipher",
    "FileStoreFile",
    "InvalidTokenError",
    "MemoryTokenStore",
    "MissingDependencyError",
    "RefreshFailedError",
    "RefreshLease",
    "RefreshLeaseMixin",
    "RefreshPolicy",
    "RefreshStats",
    "SQLAlchemyTokenStore",
    "SchemaError",
    "StoreClosedError",
    "StoredToken",
    "StoredTokenMixin",
    "TokenCipher",
    "TokenRecord",
    "TokenRepository",
    "TokenTable",
    "UndecryptableTokenError",
    "UnreadableTokenError",
    "UserMismatchError",
    "ZohoOrmStoreError",
    "export_tokens",
    "generate_key",
    "import_tokens",
    "include_name",
    "metadata",
    "provision",
    "rotate_keys",
]

_MODULES = {
    "AsyncTokenRepository": "repository",
    "FernetCipher": "encryption",
    "FileStoreFile": "transfer",
    "MemoryTokenStore": "memory",
    "RefreshLease": "models",
    "RefreshLeaseMixin": "models",
    "RefreshPolicy": "refresh",
    "RefreshStats": "refresh",
    "SQLAlchemyTokenStore": "store",
    "StoredToken": "models",
    "StoredTokenMixin": "models",
    "TokenCipher": "encryption",
    "TokenRecord": "records",
    "TokenRepository": "repository",
    "TokenTable": "transfer",
    "export_tokens": "transfer",
    "generate_key": "encryption",
    "import_tokens": "transfer",
    "include_name": "provision",
    "metadata": "models",
    "rotate_keys": "rotation",
}
"""The modules of the public names; an error's is ``errors``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "provision":
        return import_module("zoho_orm_store.provision")
    module = import_module(f"zoho_orm_store.{_MODULES.get(name, 'errors')}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
