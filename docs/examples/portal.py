"""A portal with a "Login with Zoho" button, on FastAPI.

The callback hands the grant code to the SDK, which exchanges it and saves the token in the store.
The browser's session holds nothing but the token's id. Try it without an account at Zoho:

    pip install 'zoho-orm-store[sdk]' fastapi itsdangerous uvicorn
    python portal.py
"""

import secrets
from html import escape
from urllib.parse import urlencode

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.middleware.sessions import SessionMiddleware
from zohocrmsdk.src.com.zoho.api.authenticator import OAuthToken
from zohocrmsdk.src.com.zoho.crm.api import HeaderMap, ParameterMap
from zohocrmsdk.src.com.zoho.crm.api.dc.data_center import DataCenter
from zohocrmsdk.src.com.zoho.crm.api.exception import SDKException
from zohocrmsdk.src.com.zoho.crm.api.record import GetRecordsParam, RecordOperations

from zoho_orm_store import SQLAlchemyTokenStore

PAGE = "<!doctype html><title>Portal</title><h1>Portal</h1>{}"
LOGIN = PAGE.format('<p>{}</p><a id="login" href="/login">Login with Zoho</a>')
LEADS = PAGE.format(
    "<p>{user}</p><ul>{leads}</ul>"
    '<form method="post" action="/logout"><button id="logout">Logout</button></form>'
)


def create_app(
    *,
    store: SQLAlchemyTokenStore,
    environment: DataCenter.Environment,
    consent_url: str,
    client_id: str,
    client_secret: str,
    redirect_url: str,
) -> FastAPI:
    """Make the portal. ``consent_url`` is https://accounts.zoho.com/oauth/v2/auth, for example."""
    app = FastAPI()
    app.add_middleware(SessionMiddleware, secret_key=secrets.token_hex(32), https_only=False)
    store.initialize_sdk(environment)

    # The handlers are no coroutines: FastAPI runs them in threads, and the SDK may block there.

    @app.get("/", response_class=HTMLResponse)
    def home(request: Request) -> str:
        token_id = request.session.get("token_id", "")
        if store.find_token_by_id(token_id) is None:
            return LOGIN.format("You are not logged in.")
        with store.acting_as(token_id) as token:
            user, leads = token.get_user_signature().get_name(), read_leads()
        listed = "".join(f"<li>{escape(name)}</li>" for name in leads)
        return LEADS.format(user=escape(user), leads=listed)

    @app.get("/login")
    def login(request: Request) -> RedirectResponse:
        request.session["state"] = secrets.token_urlsafe()
        asked = {
            "client_id": client_id,
            "redirect_uri": redirect_url,
            "response_type": "code",
            "access_type": "offline",
            "scope": "ZohoCRM.modules.ALL,ZohoCRM.users.READ,ZohoCRM.org.READ",
            "state": request.session["state"],
        }
        return RedirectResponse(f"{consent_url}?{urlencode(asked)}")

    @app.get("/callback")
    def callback(request: Request, code: str = "", state: str = "") -> RedirectResponse:
        expected = request.session.pop("state", "")
        if not expected or not secrets.compare_digest(state.encode(), expected.encode()):
            raise HTTPException(400, "This login was not begun here. Go back and try again.")
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
            raise HTTPException(401, "Zoho did not accept the login. Try again.") from None
        request.session["token_id"] = token.get_id()
        return RedirectResponse("/")

    @app.post("/logout")
    def logout(request: Request) -> RedirectResponse:
        token_id = request.session.pop("token_id", "")
        if store.find_token_by_id(token_id) is not None:
            with store.acting_as(token_id) as token:
                token.revoke(token_id)
            store.delete_token(token_id)
        return RedirectResponse("/", status_code=303)

    return app


def read_leads() -> list[str]:
    """Return the leads' names, as this thread's user sees them."""
    wanted = ParameterMap()
    wanted.add(GetRecordsParam.fields, "First_Name,Last_Name")
    answer = RecordOperations("Leads").get_records(wanted, HeaderMap()).get_object()
    return [
        f"{lead.get_key_value('First_Name')} {lead.get_key_value('Last_Name')}"
        for lead in answer.get_data()
    ]


if __name__ == "__main__":
    import uvicorn

    from zoho_orm_store.testing import LoopbackZoho

    with LoopbackZoho() as zoho, SQLAlchemyTokenStore("sqlite:///portal.db") as store:
        client = zoho.add_client("http://127.0.0.1:8000/callback")
        app = create_app(
            store=store,
            environment=zoho.environment(),
            consent_url=zoho.consent_url,
            client_id=client.client_id,
            client_secret=client.client_secret,
            redirect_url=client.redirect_url,
        )
        uvicorn.run(app, port=8000)
