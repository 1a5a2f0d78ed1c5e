"""A program that ends while a store is still in use: python exit_program.py FUNCTION ARGUMENTS."""

from __future__ import annotations

import sys

from sdk_tokens import make_token

from zoho_orm_store import SQLAlchemyTokenStore


class Session:
    """Something of an application's that looks a token up when it is finalized."""

    def __init__(self, store: SQLAlchemyTokenStore, id_: str) -> None:
        self._store = store
        self._id = id_

    def __del__(self) -> None:
        try:
            self._store.find_token_by_id(self._id)
        except Exception as error:  # noqa: BLE001 - what goes wrong so late is of no interest
            sys.__stderr__.write(f"{error!s:.200}\n")


def call_from_a_finalizer(url: str) -> None:
    """Keep an object to the end of the interpreter."""
    store = SQLAlchemyTokenStore(url, create_schema=False)
    token = make_token(user="u", access_token="a")
    store.save_token(token)
    globals()["kept"] = Session(store, token.get_id())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    print("DONE", flush=True)
