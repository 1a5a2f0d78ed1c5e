"""A stand-in for Zoho, to test an integration with the real SDK and without a network.

`LoopbackZoho` listens on 127.0.0.1 and answers the SDK's requests to Zoho Accounts (exchange,
refresh and revoke tokens) and to Zoho CRM (the current user, the organization, a few leads). It
enforces Zoho's limits, counts the requests, and fails when a test tells it to:

    with LoopbackZoho() as zoho:
        token = OAuthToken(
            client_id=zoho.client_id,
            client_secret=zoho.client_secret,
            refresh_token=zoho.issue_refresh_token(),
        )
        Initializer.initialize(environment=zoho.environment(), token=token, store=store)
        assert zoho.counts.refreshes == 1
"""

from zoho_orm_store.testing.accounts import (
    ACCESS_DENIED,
    ANSWER_LOST,
    CONNECTION_DROPPED,
    DEFAULT_USER,
    SERVER_ERROR,
    Client,
    Failure,
)
from zoho_orm_store.testing.loopback import (
    Counts,
    Kind,
    LoopbackZoho,
    RecordedRequest,
    RemoteZoho,
)

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
    "RemoteZoho",
]
