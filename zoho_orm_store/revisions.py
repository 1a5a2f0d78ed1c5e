"""Which revision of the tables this package works on, and what to do about any other."""

from __future__ import annotations

__all__ = ["NEWEST_REVISION", "VERSION_TABLE", "describe"]

VERSION_TABLE = "zoho_orm_store_version"
"""Where the revision is kept: a table of our own, beside a project's own ``alembic_version``."""

NEWEST_REVISION = "zoho_orm_store_0002"
"""The revision of the tables that this package works on. Later ones sort after it."""


def describe(database: str, found: str | None) -> str:
    """Say at which revision the tables are, which one is needed, and what mends it (rule G2).

    Args:
        database: The URL, as it may be shown.
        found: The revision that was found; ``None`` where there is none.
    """
    upgrade = (
        f"Run: zoho-orm-store upgrade --url '{database}', "
        "or in Python: zoho_orm_store.provision.upgrade(engine)."
    )
    if found is None:
        return (
            f"No tables of this package have been made in {database} (revision {NEWEST_REVISION} "
            f"is needed). {upgrade} A project that keeps them in migrations of its own runs those "
            "instead."
        )
    if found == NEWEST_REVISION:
        return (
            f"The tables in {database} are at revision {found}, as they should be, but were "
            f"changed since. Restore them; or drop the table {VERSION_TABLE}, which holds nothing "
            f"but the revision, and let the upgrade add what is missing. {upgrade}"
        )
    if found > NEWEST_REVISION:
        return (
            f"The tables in {database} are at revision {found}, which a newer release of this "
            f"package has made; this one needs {NEWEST_REVISION}. "
            "Run: pip install --upgrade zoho-orm-store"
        )
    return (
        f"The tables in {database} are at revision {found}, but {NEWEST_REVISION} is needed. "
        f"{upgrade}"
    )
