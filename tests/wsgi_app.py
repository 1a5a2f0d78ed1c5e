"""A web application with a store per way to the database, for the servers that fork and patch.

It is given as JSON in the environment's WSGI_APP: ``stores`` (by their names, each with a ``url`` and
a ``kind``: "url" or "engine"), ``port`` (of the running `LoopbackZoho`), ``folder``, and ``uses`` (the id
of a live token that the stores look up at once, when the module is imported).
"""

from __future__ import annotations

import json
import os
import traceback
from urllib.parse import parse_qsl

from sdk_process import OAuthToken, start, whoami
from sdk_tokens import make_token
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer

from zoho_orm_store import ConfigurationError, SQLAlchemyTokenStore
from zoho_orm_store._sdk.conversion import record_from
from zoho_orm_store.testing import LoopbackZoho

GIVEN = json.loads(os.environ["WSGI_APP"])


def store_of(url, kind):
    if kind == "url":
        bind = url
    elif make_url(url).get_dialect().is_async:
        bind = create_async_engine(url)
    else:
        bind = create_engine(url)
    return SQLAlchemyTokenStore(bind, create_schema=False, timeout=10)


STORES = {}
ZOHO = LoopbackZoho(port=GIVEN["port"])  # never started: it knows where the running one is
for name, each in GIVEN["stores"].items():
    try:
        STORES[name] = store_of(**each)
    except ConfigurationError as error:
        STORES[name] = error
    else:
        if "aiosqlite" not in name:
            # As an application does when it starts the SDK at import: this looks the token up.
            start(ZOHO, OAuthToken(id=GIVEN["uses"]), STORES[name], GIVEN["folder"])


def ping():
    return "pong"


def call(store, id):
    """Become a user, and ask the CRM who that is."""
    Initializer.initializer.store = store
    Initializer.switch_user(token=OAuthToken(id=id))
    return whoami()


def lookups(store, user, number):
    """Look a user's token up, several times and in all ways, and save it now and then.

    Returns:
        The users whose tokens it was, according to each answer.
    """
    number = int(number)
    answers = [store.find_token_by_id(user) for _ in range(3)]
    if number % 5 == 0:
        saved = make_token(id=user, user=user, access_token=f"token of {user}")
        store.save_token(saved)
        answers.append(saved)
    answers += [store.find_token(make_token(user=user)), store.find_token_by_id(user)]
    records = [answer and record_from(answer) for answer in answers]
    return [each and (each.id, each.user_name, each.access_token) for each in records]


def refused(store):
    """What the store was refused with, or fails with."""
    if isinstance(store, SQLAlchemyTokenStore):
        store.get_tokens()
    return f"{type(store).__name__}: {store}"


def application(environ, start_response):
    query = dict(parse_qsl(environ["QUERY_STRING"]))
    if "store" in query:
        query["store"] = STORES[query["store"]]
    function = {"/ping": ping, "/call": call, "/lookups": lookups, "/refused": refused}
    try:
        answer = {"answer": function[environ["PATH_INFO"]](**query)}
    except BaseException as error:  # noqa: BLE001 - reported, whatever it is
        answer = {"error": f"{error}\n{traceback.format_exc()}"}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer | {"pid": os.getpid()}).encode()]
