"""Interrupt reads of a SQLite file hundreds of times, and then read: python interrupted_reader.py URL"""

from __future__ import annotations

import gc
import random
import signal
import sys

from zoho_orm_store import provision
from zoho_orm_store._database.database import open_database
from zoho_orm_store._tokens import Filters, TokenOperations
from zoho_orm_store.models import StoredToken


class InterruptionError(Exception):
    pass


def interrupt(*_):
    raise InterruptionError


provision.upgrade(sys.argv[1])
database = open_database(sys.argv[1], timeout=2)
operations = TokenOperations(StoredToken.__table__)
gc.freeze()
signal.signal(signal.SIGVTALRM, interrupt)
interrupted = 0
while interrupted < 400:
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(0.0001, 0.003))
        for _ in range(1000):  # Python loses a signal that comes while it runs a finalizer.
            database.read(operations.count, Filters())
    except InterruptionError:
        interrupted += 1
        gc.collect()  # gives connections back that were lost on the way to their variables
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
print(database.read(operations.count, Filters()))
database.close()
