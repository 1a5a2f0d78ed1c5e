"""Models beside those of a base that cannot take the mixins: one of dataclasses, and SQLModel.

SQLAlchemy 2.1 refuses a mixin that is no dataclass on such a base (2.0 warns), and SQLModel refuses
the mixin's annotations. A second base shares the metadata with the project's own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import sqlmodel
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from conftest import on_empty_sqlite
from sdk_tokens import make_token
from sqlalchemy import ForeignKey, create_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    relationship,
)

from zoho_orm_store import (
    ConfigurationError,
    RefreshLeaseMixin,
    SQLAlchemyTokenStore,
    StoredTokenMixin,
    TokenRecord,
    TokenRepository,
)


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Account(DataclassBase):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str]
    tokens: Mapped[list[AccountToken]] = relationship(back_populates="account", init=False)


class BesideDataclasses(DeclarativeBase):
    registry = DataclassBase.registry


class AccountToken(StoredTokenMixin, BesideDataclasses):
    __tablename__ = "account_token"

    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"))
    account: Mapped[Account] = relationship(back_populates="tokens")


class AccountLease(RefreshLeaseMixin, BesideDataclasses):
    __tablename__ = "account_lease"


class Customer(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


class BesideSQLModel(DeclarativeBase):
    metadata = sqlmodel.SQLModel.metadata


class CustomerToken(StoredTokenMixin, BesideSQLModel):
    __tablename__ = "customer_token"

    account_id: Mapped[int] = mapped_column(ForeignKey("customer.id"))
    account: Mapped[Customer] = relationship(Customer, backref="tokens")


class CustomerLease(RefreshLeaseMixin, BesideSQLModel):
    __tablename__ = "customer_lease"


class Project(NamedTuple):
    account: type
    token: type[StoredTokenMixin]
    lease: type[RefreshLeaseMixin]
    session: type[Session]


on_each_base = pytest.mark.parametrize(
    "project",
    [
        Project(Account, AccountToken, AccountLease, Session),
        Project(Customer, CustomerToken, CustomerLease, sqlmodel.Session),
    ],
    ids=["dataclasses", "SQLModel"],
)


@on_each_base
@on_empty_sqlite
def test_a_token_belongs_to_its_account_and_the_store_finds_it(project, empty_database):
    engine = create_engine(empty_database)
    project.account.metadata.create_all(engine)
    asked = TokenRecord(refresh_token="r")
    with project.session(engine) as session, session.begin():
        account = project.account(name="ada")
        session.add(account)
        session.flush()
        tokens = TokenRepository(session, model=project.token)
        with pytest.raises(ConfigurationError, match="a value for the column 'account_id'"):
            tokens.save(asked)
        saved = tokens.save(asked, values={"account_id": account.id})
        assert tokens.find(asked) == saved
    with SQLAlchemyTokenStore(engine, model=project.token, lease_model=project.lease) as store:
        token = make_token(refresh_token="r")
        assert store.find_token(token) is token
        token.set_access_token("a")
        store.save_token(token)
        assert store.find_token_by_id(saved.id).get_access_token() == "a"
    with project.session(engine) as session:
        stored = session.get(project.token, saved.id)
        assert (stored.access_token, stored.account.name) == ("a", "ada")
        assert stored.account.tokens == [stored]
    engine.dispose()


@on_each_base
def test_one_autogenerate_makes_the_tables_of_both_bases(project):
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        upgrade = produce_migrations(context, project.account.metadata).upgrade_ops
        code = render_python_code(upgrade, migration_context=context)
    tables = [each.__table__.name for each in (project.account, project.lease, project.token)]
    assert re.findall(r"create_table\('(\w+)'", code) == tables
    assert f"sa.ForeignKeyConstraint(['account_id'], ['{tables[0]}.id']" in code
    engine.dispose()
