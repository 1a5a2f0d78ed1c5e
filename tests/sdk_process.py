"""An application in a process of its own: it starts the SDK with a refresh token, and calls the API.

What it needs comes as JSON on stdin, what it found out leaves as JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys

from sdk_releases import SDK, TAKES_CHOICES
from zohocrmsdk.src.com.zoho.api.authenticator.oauth_token import OAuthToken
from zohocrmsdk.src.com.zoho.api.logger import Logger
from zohocrmsdk.src.com.zoho.crm.api import HeaderMap, ParameterMap
from zohocrmsdk.src.com.zoho.crm.api.initializer import Initializer
from zohocrmsdk.src.com.zoho.crm.api.record import GetRecordsParam, RecordOperations
from zohocrmsdk.src.com.zoho.crm.api.users import GetUsersParam, UsersOperations
from zohocrmsdk.src.com.zoho.crm.api.util import Choice

from zoho_orm_store import SQLAlchemyTokenStore
from zoho_orm_store.testing import LoopbackZoho, RemoteZoho


def start(
    zoho: LoopbackZoho | RemoteZoho, token: OAuthToken, store: object, folder: object
) -> None:
    """Start the SDK, which writes nothing outside of the folder and no log."""
    if SDK < (8, 3):
        Initializer.LOCAL.init = None  # They would log in with the store of the start before.
    Initializer.initialize(
        environment=zoho.environment(),
        token=token,
        store=store,
        resource_path=str(folder),
        logger=Logger.get_instance(Logger.Levels.NOTSET),
    )


def whoami() -> str:
    """The email address of the user that Zoho takes the SDK's caller for."""
    params = ParameterMap()
    who = "CurrentUser"
    params.add(GetUsersParam.type, Choice(who) if TAKES_CHOICES else who)
    response = UsersOperations().get_users(params, HeaderMap())
    return response.get_object().get_users()[0].get_email()


def last_names() -> list[str]:
    """What the leads at Zoho are called."""
    params = ParameterMap()
    params.add(GetRecordsParam.fields, "Last_Name")
    if SDK < (6, 0):
        response = RecordOperations().get_records("Leads", params, HeaderMap())
    else:
        response = RecordOperations("Leads").get_records(params, HeaderMap())
    return [lead.get_key_value("Last_Name") for lead in response.get_object().get_data()]


def main() -> None:
    given = json.load(sys.stdin)
    token = OAuthToken(**given["token"])
    zoho = LoopbackZoho.connect(f"http://127.0.0.1:{given['port']}")
    with SQLAlchemyTokenStore(given["url"], create_schema=False) as store:
        start(zoho, token, store, given["folder"])
        answer = {"pid": os.getpid(), "id": token.get_id(), "user": whoami(), "leads": last_names()}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
