"""Keep the Zoho CRM SDK's OAuth tokens in a SQLAlchemy database.

Every public name is imported when it is first used, so that `import zoho_orm_store` loads neither
the Zoho SDK, nor SQLAlchemy, Alembic or cryptography.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoho_orm_store import provision as provision
    from zoho_orm_store.encryption import (
        FernetCipher as FernetCipher,
    )
    from zoho_orm_store.encryption import (
        TokenCipher as TokenCipher,
    )
    from zoho_orm_store.encryption import (
        generate_key as generate_key,
    )
    from zoho_orm_store.errors import (
        CipherError as CipherError,
    )
    from zoho_orm_store.errors import (
        ConfigurationError as ConfigurationError,
    )
    from zoho_orm_store.errors import (
        DatabaseError as DatabaseError,
    )
    from zoho_orm_store.errors import (
        DatabaseTimeoutError as DatabaseTimeoutError,
    )
    from zoho_orm_store.errors import (
        DatabaseUnreachableError as DatabaseUnreachableError,
    )
    from zoho_orm_store.errors import (
        InvalidTokenError as InvalidTokenError,
    )
    from zoho_orm_store.errors import (
        MissingDependencyError as MissingDependencyError,
    )
    from zoho_orm_store.errors import (
        RefreshFailedError as RefreshFailedError,
    )
    from zoho_orm_store.errors import (
        SchemaError as SchemaError,
    )
    from zoho_orm_store.errors import (
        StoreClosedError as StoreClosedError,
    )
    from zoho_orm_store.errors import (
        UndecryptableTokenError as UndecryptableTokenError,
    )
    from zoho_orm_store.errors import (
        UserMismatchError as UserMismatchError,
    )
    from zoho_orm_store.errors import (
        ZohoOrmStoreError as ZohoOrmStoreError,
    )
    from zoho_orm_store.memory import MemoryTokenStore as MemoryTokenStore
    from zoho_orm_store.models import (
        RefreshLease as RefreshLease,
    )
    from zoho_orm_store.models import (
        RefreshLeaseMixin as RefreshLeaseMixin,
    )
    from zoho_orm_store.models import (
        StoredToken as StoredToken,
    )
    from zoho_orm_store.models import (
        StoredTokenMixin as StoredTokenMixin,
    )
    from zoho_orm_store.models import (
        metadata as metadata,
    )
    from zoho_orm_store.provision import include_name as include_name
    from zoho_orm_store.records import TokenRecord as TokenRecord
    from zoho_orm_store.refresh import (
        RefreshPolicy as RefreshPolicy,
    )
    from zoho_orm_store.refresh import (
        RefreshStats as RefreshStats,
    )
    from zoho_orm_store.repository import (
        AsyncTokenRepository as AsyncTokenRepository,
    )
    from zoho_orm_store.repository import (
        TokenRepository as TokenRepository,
    )
    from zoho_orm_store.rotation import rotate_keys as rotate_keys
    from zoho_orm_store.store import SQLAlchemyTokenStore as SQLAlchemyTokenStore
    from zoho_orm_store.transfer import (
        FileStoreFile as FileStoreFile,
    )
    from zoho_orm_store.transfer import (
        TokenTable as TokenTable,
    )
    from zoho_orm_store.transfer import (
        export_tokens as export_tokens,
    )
    from zoho_orm_store.transfer import (
        import_tokens as import_tokens,
    )

__version__ = "0.1.0"

_MODULES = {
    "AsyncTokenRepository": "repository",
    "CipherError": "errors",
    "ConfigurationError": "errors",
    "DatabaseError": "errors",
    "DatabaseTimeoutError": "errors",
    "DatabaseUnreachableError": "errors",
    "FernetCipher": "encryption",
    "FileStoreFile": "transfer",
    "InvalidTokenError": "errors",
    "MemoryTokenStore": "memory",
    "MissingDependencyError": "errors",
    "RefreshFailedError": "errors",
    "RefreshLease": "models",
    "RefreshLeaseMixin": "models",
    "RefreshPolicy": "refresh",
    "RefreshStats": "refresh",
    "SQLAlchemyTokenStore": "store",
    "SchemaError": "errors",
    "StoreClosedError": "errors",
    "StoredToken": "models",
    "StoredTokenMixin": "models",
    "TokenCipher": "encryption",
    "TokenRecord": "records",
    "TokenRepository": "repository",
    "TokenTable": "transfer",
    "UndecryptableTokenError": "errors",
    "UserMismatchError": "errors",
    "ZohoOrmStoreError": "errors",
    "export_tokens": "transfer",
    "generate_key": "encryption",
    "import_tokens": "transfer",
    "include_name": "provision",
    "metadata": "models",
    "provision": "",
    "rotate_keys": "rotation",
}
"""The public names, and the modules that define them."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "provision":
        return import_module("zoho_orm_store.provision")
    value: object = getattr(import_module(f"zoho_orm_store.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
