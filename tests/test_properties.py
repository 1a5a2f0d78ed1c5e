"""Random sequences of saves, finds and deletes, held against a naive model of the contract."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
from conftest import empty
from contract_model import Model, RefusedError
from databases import DATABASES
from hypothesis import given, settings
from hypothesis import strategies as st
from sdk_tokens import make_token

from zoho_orm_store import MemoryTokenStore, SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import SDKException

USERS = ("jose", "José", "Jose\u0301", "jose ", "x' or '1'='1", "%", "\U0001f511")
CLIENTS = ("c", "C", "c ")
TOKENS = ("t", "T", "ť", "t ")
IDS = ("1", "1 ", "10", "1 or 1=1", "é", "e\u0301")


def few(values):
    """A pair of values, since only tokens that share some can be taken for each other."""
    return st.lists(st.sampled_from(values), min_size=2, max_size=2, unique=True)


def once_in(times, strategy):
    return st.one_of(*[st.none()] * (times - 1), strategy)


@st.composite
def operations(draw):
    users, clients, tokens, ids = (draw(few(pool)) for pool in (USERS, CLIENTS, TOKENS, IDS))
    fields = st.fixed_dictionaries(
        {
            "id": once_in(6, st.sampled_from(ids)),
            "user": once_in(2, st.sampled_from(users)),
            "client_id": once_in(2, st.sampled_from(clients)),
            "client_secret": once_in(4, st.just("s")),
            "refresh_token": once_in(2, st.sampled_from(tokens)),
            "access_token": once_in(2, st.sampled_from(tokens)),
            "grant_token": once_in(4, st.sampled_from(tokens)),
            "expires_in": once_in(2, st.sampled_from(("1", "2", "3"))),
            "redirect_url": once_in(4, st.sampled_from(("r", "R"))),
        },
    )
    known_fields = fields.map(lambda all: {k: v for k, v in all.items() if v is not None})
    operation = st.one_of(
        *[st.tuples(st.just("save"), known_fields)] * 6,
        *[st.tuples(st.just("find"), known_fields)] * 3,
        st.tuples(st.just("delete"), st.sampled_from(ids)),
        st.tuples(st.just("delete one"), st.integers(0, 5)),
        st.tuples(st.just("delete all"), st.none()),
    )
    return draw(st.lists(operation, min_size=3, max_size=16))


def as_dict(token):
    """What a token knows, under the names of the model."""
    signature = token.get_user_signature()
    values = {"id": token.get_id(), "user": signature.get_name() if signature else None}
    names = ("client_id", "client_secret", "refresh_token", "access_token", "grant_token")
    for name in (*names, "expires_in", "redirect_url"):
        values[name] = getattr(token, f"get_{name}")()
    return {name: value for name, value in values.items() if value is not None}


def without_age(rows):
    return [{k: v for k, v in row.items() if k != "age"} for row in rows]


def check_sequence(store, sequence):
    """Do the same with the store and with the model, and compare after each step."""
    model, ages = Model(), itertools.count()
    for operation, argument in sequence:
        if operation == "find":
            token = make_token(**argument)
            found = store.find_token(token)
            expected = model.find(argument)
            assert (found is token) == (expected is not None), (operation, argument)
            assert as_dict(token) == (argument if expected is None else expected)
        elif operation == "save":
            check_save(store, model, argument, next(ages))
        else:
            ids = [row["id"] for row in model.rows]
            if operation == "delete":
                store.delete_token(argument)
                doomed = [argument]
            elif operation == "delete one":
                doomed = ids[argument : argument + 1]
                for id_ in doomed:
                    store.delete_token(id_)
            else:
                store.delete_tokens()
                doomed = ids
            model.rows = [row for row in model.rows if row["id"] not in doomed]
        stored = sorted(map(as_dict, store.get_tokens()), key=lambda row: row["id"])
        assert stored == sorted(without_age(model.rows), key=lambda row: row["id"]), operation
        for row in stored:
            assert as_dict(store.find_token_by_id(row["id"])) == row


def check_save(store, model, argument, age):
    token = make_token(**argument)
    before = [dict(row) for row in model.rows]
    try:
        model.save(argument | {"age": age})
    except RefusedError:
        assert model.rows == before
        with pytest.raises(SDKException):
            store.save_token(token)
        assert as_dict(token) == argument
        return
    store.save_token(token)
    saved = model.rows[-1]
    saved.setdefault("id", token.get_id())
    assert token.get_id() == saved["id"]


def examples(number):
    """So many sequences in every run, and ten times as many in a long one."""
    return pytest.mark.parametrize(
        "examples", [number, pytest.param(10 * number, marks=pytest.mark.soak)]
    )


def check_sequences(examples, make_store):
    """Check random sequences, each on what a call makes."""

    @settings(max_examples=examples, deadline=None)
    @given(operations())
    def check(sequence):
        with make_store() as store:
            check_sequence(store, sequence)

    check()


@pytest.mark.timeout(900)
@examples(200)
def test_the_memory_store_does_what_the_model_does(examples):
    check_sequences(examples, MemoryTokenStore)


@pytest.mark.timeout(900)
@examples(120)
def test_sqlite_in_memory_does_what_the_model_does(examples):
    # It would remember a lease of one sequence in the next, where its token is another one.
    with SQLAlchemyTokenStore("sqlite://", refresh=None) as store:

        def emptied():
            store.delete_tokens()
            return nullcontext(store)

        check_sequences(examples, emptied)


@pytest.mark.timeout(900)
@examples(25)
@pytest.mark.parametrize("name", DATABASES)
def test_each_database_does_what_the_model_does(name, provisioned, examples):
    url = provisioned(name)

    def on_an_empty_database():
        empty(url)
        # A store of its own: one that remembers a refresh lease that is gone would take the tokens
        # of this sequence for those that another worker has refreshed meanwhile.
        return SQLAlchemyTokenStore(url)

    check_sequences(examples, on_an_empty_database)
