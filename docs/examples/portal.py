"""A portal with a "Login with Zoho" button, on FastAPI.

The callback hands the grant code to the SDK, which exchanges it and saves the token in the store.
The browser's session holds nothing but the token's id. Try it without an account at Zoho:

    pip install '/path/to/clone[sdk]' fastapi itsdangerous python-multipart uvicorn
    python portal.py
"""

import secrets
from collections.abc import Awaitable, Callable
from html import escape
from typing import Annotated
from urllib.parse import urlencode, urlsplit

from fastapi import FastAPI, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.middleware.sessions import SessionMiddleware
from zohocrmsdk.src.com.zoho.api.authenticator import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api import HeaderMap, ParameterMap
from zohocrmsdk.src.com.zoho.crm.api.dc.data_center import DataCenter
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.record import (
    GetRecordsParam,
    RecordOperations,
    ResponseWrapper,
)

from zoho_orm_store import SQLAlchemyTokenStore

PAGE = '<!doctype html><html lang="en"><title>Portal</title><h1>Portal</h1>{}</html>'
LOGIN = PAGE.format('<p>{}</p><a id="login" href="/login">Login with Zoho</a>')
LEADS = PAGE.format(
    "<p>{user}</p><ul>{leads}</ul>"
    '<form method="post" action="/logout"><button id="logout">Logout</button>'
    '<input type="hidden" name="form_token" value="{form_token}"></form>'
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the callback's address holds a code
    "X-Content-Type-Options": "nosniff",
}
EIGHT_HOURS = 8 * 60 * 60


def create_app(
    *,
    store: SQLAlchemyTokenStore,
    environment: DataCenter.Environment,
    consent_url: str,
    client_id: str,
    client_secret: str,
    redirect_url: str,
    session_key: str,
) -> FastAPI:
    """Make the portal.

    Args:
        store: A store made with ``used_grants="forget"``: otherwise the address of a callback, read
            from a log, logs its reader in as the user.
        environment: The data centre of logins, such as ``USDataCenter.PRODUCTION()``.
        consent_url: Zoho's page for it, such as https://accounts.zoho.com/oauth/v2/auth.
        client_id: The OAuth client.
        client_secret: Its secret.
        redirect_url: The address of ``/callback``, as it is registered at Zoho.
        session_key: Signs the cookies: a secret of 32 random bytes or more, the same in every
            worker and after a restart.
    """
    app = FastAPI(openapi_url=None)
    is_secure = urlsplit(redirect_url).scheme == "https"
    app.add_middleware(
        SessionMiddleware,
        secret_key=session_key,
        session_cookie="__Host-session" if is_secure else "session",  # of this host alone
        max_age=EIGHT_HOURS,
        same_site="lax",  # "strict" would not be sent when Zoho redirects back
        https_only=is_secure,
    )
    store.initialize_sdk(environment)

    @app.middleware("http")
    async def with_headers(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(SDKException)
    async def without_details(request: Request, error: Exception) -> Response:
        return problem(502, "Zoho does not answer, or no longer accepts your login.")

    # The handlers are no coroutines: FastAPI runs them in threads, and the SDK may block there.

    @app.get("/", response_class=HTMLResponse)
    def home(request: Request) -> Response:
        token_id = request.session.get("token_id", "")
        if store.find_token_by_id(token_id) is None:
            return HTMLResponse(LOGIN.format("You are not logged in."))
        with store.acting_as(token_id) as token:
            user, leads = token.get_user_signature().get_name(), read_leads()
        listed = "".join(f"<li>{escape(name)}</li>" for name in leads)
        form_token = escape(request.session["form_token"])
        return HTMLResponse(LEADS.format(user=escape(user), leads=listed, form_token=form_token))

    @app.get("/login")
    def login(request: Request) -> Response:
        request.session["state"] = secrets.token_urlsafe()
        asked = {
            "client_id": client_id,
            "redirect_uri": redirect_url,
            "response_type": "code",
            "access_type": "offline",
            "prompt": "consent",  # without it, Zoho sends a refresh token only the first time
            "scope": "ZohoCRM.modules.ALL,ZohoCRM.users.READ,ZohoCRM.org.READ",
            "state": request.session["state"],
        }
        return RedirectResponse(f"{consent_url}?{urlencode(asked)}", status_code=303)

    @app.get("/callback")
    def callback(request: Request, code: str = "", state: str = "") -> Response:
        expected = request.session.pop("state", "")
        if not is_same(state, expected):
            return problem(400, "This login was not begun in this browser. Please begin again.")
        if not code:
            return problem(403, "You did not give the portal access to your CRM.")
        token = OAuthToken(
            client_id=client_id,
            client_secret=client_secret,
            grant_token=code,
            redirect_url=redirect_url,
        )
        try:
            with store.acting_as(token):  # this logs in, and gives the token its id
                read_leads()
        except SDKException:
            return problem(401, "Zoho did not accept the login. Please begin again.")
        request.session.clear()  # nothing of the visitor before the login survives it
        request.session["token_id"] = token.get_id()
        request.session["form_token"] = secrets.token_urlsafe()
        return RedirectResponse("/", status_code=303)

    @app.post("/logout")
    def logout(request: Request, form_token: Annotated[str, Form()] = "") -> Response:
        if not is_same(form_token, request.session.get("form_token", "")):
            return problem(403, "This form is out of date. Go back, reload the page, try again.")
        token_id = request.session["token_id"]
        request.session.clear()
        try:
            if store.find_token_by_id(token_id) is not None:
                with store.acting_as(token_id) as token:
                    token.revoke(token_id)
        except SDKException:
            pass  # Zoho does not answer, or has ended the login itself
        finally:
            store.delete_token(token_id)
        return RedirectResponse("/", status_code=303)

    return app


def is_same(given: str, expected: str) -> bool:
    """Whether a visitor sent what the session expects, which must not be empty."""
    return bool(expected) and secrets.compare_digest(given.encode(), expected.encode())


def problem(status: int, text: str) -> HTMLResponse:
    """Return a page that says what happened, without details."""
    return HTMLResponse(LOGIN.format(escape(text)), status)


def read_leads() -> list[str]:
    """Return the leads' names, as this thread's user sees them.

    Raises:
        SDKException: Zoho refused the request.
    """
    wanted = ParameterMap()
    wanted.add(GetRecordsParam.fields, "First_Name,Last_Name")
    response = RecordOperations("Leads").get_records(wanted, HeaderMap())
    if response.get_status_code() == 204:  # there are none
        return []
    answer = response.get_object()
    if not isinstance(answer, ResponseWrapper):
        raise SDKException("NO_LEADS", "Zoho did not list the leads.")
    return [
        f"{lead.get_key_value('First_Name')} {lead.get_key_value('Last_Name')}"
        for lead in answer.get_data()
    ]


if __name__ == "__main__":
    import uvicorn

    from zoho_orm_store.testing import LoopbackZoho

    with (
        LoopbackZoho() as zoho,
        SQLAlchemyTokenStore("sqlite:///portal.db", used_grants="forget") as store,
    ):
        client = zoho.add_client("http://127.0.0.1:8000/callback")
        app = create_app(
            store=store,
            environment=zoho.environment(),
            consent_url=zoho.consent_url,
            client_id=client.client_id,
            client_secret=client.client_secret,
            redirect_url=client.redirect_url,
            session_key=secrets.token_hex(32),  # in production: one for all workers, kept secret
        )
        uvicorn.run(app, port=8000)
