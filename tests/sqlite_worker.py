"""A process that saves and finds its own token over and over: python sqlite_worker.py URL SECONDS.

Prints the number of saves, the longest call in seconds, and what went wrong, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

from sdk_tokens import make_token

from zoho_orm_store import SQLAlchemyTokenStore

logging.disable()
url, seconds = sys.argv[1], float(sys.argv[2])
known = {"user": f"user {os.getpid()}", "client_id": "c", "refresh_token": f"r {os.getpid()}"}
saves, longest, failures = 0, 0.0, []
with SQLAlchemyTokenStore(url, create_schema=False, timeout=2.0) as store:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        saves += 1
        expires_in = str(int(time.time() * 1000) + 3_600_000)
        token = make_token(**known, access_token=f"a {saves}", expires_in=expires_in)
        for call in (
            lambda token=token: store.save_token(token),
            lambda: store.find_token(make_token(**known)),
        ):
            started = time.monotonic()
            try:
                call()
            except Exception as error:  # noqa: BLE001 - reported, whatever it is
                failures.append(str(error))
            longest = max(longest, time.monotonic() - started)
print(json.dumps({"saves": saves, "longest": longest, "failures": failures}))
