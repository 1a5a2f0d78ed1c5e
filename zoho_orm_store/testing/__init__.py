"""A loopback Zoho, to test an integration with the real SDK and without a network.

`LoopbackZoho` answers on 127.0.0.1 what the Zoho CRM SDK asks of Zoho Accounts (exchange, refresh
and revoke tokens) and of Zoho CRM (who am I, which organization, read a few leads). It keeps
Zoho's limits, counts what it was asked, and fails on demand:

    with LoopbackZoho() as zoho:
        token = OAuthToken(
            client_id=zoho.client_id,
            client_secret=zoho.client_secret,
            refresh_token=zoho.issue_refresh_token(),
        )
        Initializer.initialize(environment=zoho.environment(), token=token, store=store)
        assert zoho.counts.refreshes == 1
"""

from zoho_orm_store.testing.accounts import DEFAULT_USER, Client
from zoho_orm_store.testing.answers import (
    ACCESS_DENIED,
    ANSWER_LOST,
    CONNECTION_DROPPED,
    SERVER_ERROR,
    Failure,
)
from zoho_orm_store.testing.loopback import LoopbackZoho
from zoho_orm_store.testing.recording import Counts, Kind, RecordedRequest

__all__ = [
    "ACCESS_DENIED",
    "ANSWER_LOST",
    "CONNECTION_DROPPED",
    "DEFAULT_USER",
    "SERVER_ERROR",
    "Client",
    "Counts",
    "Failure",
    "Kind",
    "LoopbackZoho",
    "RecordedRequest",
]
