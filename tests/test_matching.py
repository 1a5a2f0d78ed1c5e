"""The matching rules as pure functions: B, C and E of the contract."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest

from zoho_orm_store import InvalidTokenError, TokenRecord, UserMismatchError
from zoho_orm_store._digests import Digests, digests_of
from zoho_orm_store._matching import (
    Identity,
    Lookup,
    check_credentials,
    claim_of,
    filled,
    find_match,
    identity_of,
    is_absorbed,
    learns_refresh_token,
    lookups_to_find,
    lookups_to_save,
    matches,
    merged,
    plan_update,
)


class TestLookups:
    @pytest.mark.parametrize(
        ("asked", "lookups"),
        [
            ({}, []),
            ({"id": "1", "user_name": "u", "refresh_token": "r"}, ["ID"]),
            ({"user_name": "u", "grant_token": "g"}, ["USER", "GRANT"]),
            ({"access_token": "a", "refresh_token": "r"}, ["ACCESS", "REFRESH"]),
            ({"access_token": "a", "client_id": "c", "refresh_token": "r"}, ["REFRESH"]),
            ({"access_token": "a", "client_secret": "s"}, []),
            ({"grant_token": "g", "refresh_token": "r"}, ["GRANT", "REFRESH"]),
            ({"user_name": "u" * 513}, []),
        ],
    )
    def test_to_find_B1_B5_B9(self, asked, lookups):
        assert [lookup.name for lookup in lookups_to_find(TokenRecord(**asked))] == lookups

    @pytest.mark.parametrize(
        ("asked", "lookups"),
        [
            ({"id": "1", "user_name": "u"}, ["ID", "USER"]),
            ({"access_token": "a", "client_id": "c"}, ["IDENTITY"]),
            ({"access_token": "a"}, ["ACCESS"]),
            ({"access_token": "a", "client_id": "c", "user_name": "u"}, ["USER"]),
        ],
    )
    def test_to_save_B9_E4(self, asked, lookups):
        assert [lookup.name for lookup in lookups_to_save(TokenRecord(**asked))] == lookups

    @pytest.mark.parametrize(
        ("asked", "stored", "hit"),
        [
            ({"user_name": "u"}, {"user_name": "u", "client_id": "c"}, True),
            ({"user_name": "u", "client_id": "c"}, {"user_name": "u"}, True),
            ({"user_name": "u", "client_id": "c"}, {"user_name": "u", "client_id": "C"}, False),
            ({"user_name": "u"}, {"user_name": "u "}, False),
        ],
    )
    def test_a_match_never_crosses_clients_B2_B6(self, asked, stored, hit):
        assert matches(Lookup.USER, TokenRecord(**asked), TokenRecord(**stored)) is hit

    def test_a_match_never_crosses_users_B6(self):
        asked = TokenRecord(user_name="u", refresh_token="r")
        assert not matches(Lookup.REFRESH, asked, TokenRecord(user_name="v", refresh_token="r"))
        assert matches(Lookup.REFRESH, asked, TokenRecord(refresh_token="r"))

    def test_the_first_lookup_that_finds_anything_decides_B2_B7(self):
        def row(id_, user, client, day):
            return TokenRecord(
                id=id_,
                user_name=user,
                client_id=client,
                refresh_token="r",
                updated_at=datetime(2026, 1, day),
            )

        rows = [row("1", "u", None, 3), row("2", "u", "c", 1), row("3", None, "c", 2)]

        def found(**fields):
            asked = TokenRecord(refresh_token="r", **fields)
            match = find_match(lookups_to_find(asked), asked, rows)
            return match and match.id

        assert found(user_name="u", client_id="c") == "2"
        assert found(user_name="u", client_id="d") == "1"
        assert found(user_name="v", client_id="c") == "3"
        assert found(user_name="v", client_id="d") is None
        assert found() == "1"


class TestFilling:
    @pytest.mark.parametrize(
        ("asked", "stored", "pair"),
        [
            ((None, None), ("s", 5), ("s", 5)),
            ((None, 3), ("s", None), ("s", None)),
            ((None, 3), (None, 5), (None, 3)),
            ((None, None), (None, 5), (None, 5)),
            (("s", None), ("s", 5), ("s", 5)),
            (("s", 9), ("s", 5), ("s", 9)),
            (("a", 4), ("s", 5), ("s", 5)),
            (("a", 5), ("s", 5), ("a", 5)),
            (("a", 6), ("s", 5), ("a", 6)),
            (("a", None), ("s", 5), ("a", None)),
            (("a", 4), ("s", None), ("a", 4)),
            (("a", 4), (None, None), ("a", 4)),
        ],
    )
    def test_the_access_token_and_its_expiry_are_one_pair_C2(self, asked, stored, pair):
        asked = TokenRecord(access_token=asked[0], expiry_time=asked[1])
        stored = TokenRecord(access_token=stored[0], expiry_time=stored[1])
        result = filled(asked, stored)
        assert (result.access_token, result.expiry_time) == pair

    def test_only_what_is_unknown_is_filled_in_C1(self):
        asked = TokenRecord(user_name="u", redirect_url="mine")
        stored = TokenRecord(id="1", user_name="u", redirect_url="theirs", api_domain="d")
        assert filled(asked, stored) == TokenRecord(
            id="1", user_name="u", redirect_url="mine", api_domain="d"
        )


class TestSaving:
    def test_known_values_overwrite_and_unknown_ones_stay_E1(self):
        stored = TokenRecord(id="1", refresh_token="r", access_token="a", expiry_time=5)
        asked = TokenRecord(id="2", refresh_token="R", api_domain="d")
        assert merged(stored, asked) == TokenRecord(
            id="1", refresh_token="R", access_token="a", expiry_time=5, api_domain="d"
        )

    def test_a_new_access_token_without_an_expiry_clears_the_old_ones_E1(self):
        stored = TokenRecord(access_token="a", expiry_time=5)
        assert merged(stored, TokenRecord(access_token="b")).expiry_time is None
        assert merged(stored, TokenRecord(access_token="a")).expiry_time == 5

    @pytest.mark.parametrize(
        ("record", "kind", "value"),
        [
            ({"user_name": "u", "refresh_token": "r"}, "user_name", "u"),
            ({"refresh_token": "r", "grant_token": "g"}, "refresh_token", "r"),
            ({"grant_token": "g", "access_token": "a"}, "grant_token", "g"),
            ({"access_token": "a"}, "access_token", "a"),
        ],
    )
    def test_the_identity_E4(self, record, kind, value):
        assert identity_of(TokenRecord(**record, client_id="c")) == Identity(kind, value, "c")

    def test_without_a_credential_there_is_nothing_to_save_E3(self):
        with pytest.raises(InvalidTokenError, match="nothing to store"):
            check_credentials(TokenRecord(user_name="u", client_id="c", client_secret="s"))

    def test_another_users_row_is_not_touched_E5(self):
        stored = TokenRecord(id="1", user_name="u", refresh_token="r")
        with pytest.raises(UserMismatchError):
            plan_update(stored, TokenRecord(id="1", user_name="v"), [])

    @pytest.mark.parametrize(
        ("other", "absorbed"),
        [
            ({"user_name": "u", "client_id": "c"}, True),
            ({"refresh_token": "r"}, True),
            ({"refresh_token": "r", "client_id": "c"}, True),
            ({"refresh_token": "r", "client_id": "C"}, False),
            ({"refresh_token": "R"}, False),
            ({"user_name": "v", "client_id": "c", "refresh_token": "r"}, False),
            ({"user_name": "u", "client_id": "C", "refresh_token": "r"}, False),
        ],
    )
    def test_which_rows_turn_out_to_be_the_same_E4_B10(self, other, absorbed):
        saved = TokenRecord(id="1", user_name="u", client_id="c", refresh_token="r")
        assert is_absorbed(TokenRecord(id="2", **other), saved) is absorbed

    def test_tied_rows_become_the_users_own_with_the_newest_values_E4(self):
        own = TokenRecord(
            id="own", user_name="u", api_domain="old", updated_at=datetime(2026, 1, 1)
        )
        met = TokenRecord(
            id="met", refresh_token="r", api_domain="new", updated_at=datetime(2026, 1, 2)
        )
        asked = TokenRecord(user_name="u", refresh_token="r", access_token="a")
        for stored, other in ((met, own), (own, met)):
            saved, removed = plan_update(stored, asked, [other])
            assert (saved.id, saved.api_domain, saved.access_token) == ("own", "new", "a")
            assert removed == ["met"]

    def test_a_row_without_user_joins_the_users_own_E4_E7(self):
        own = TokenRecord(id="own", user_name="u", client_id="c", refresh_token="r")
        met = TokenRecord(id="met", refresh_token="r")
        saved, removed = plan_update(met, TokenRecord(id="met", access_token="a"), [own])
        assert saved == replace(own, access_token="a")
        assert removed == ["met"]

    @pytest.mark.parametrize("other", [{"client_id": "C"}, {"refresh_token": "R"}], ids=" ".join)
    def test_a_row_without_user_joins_no_other_clients_or_tokens_row_E4_B6(self, other):
        own = TokenRecord(id="own", user_name="u", client_id="c", refresh_token="r")
        met = replace(TokenRecord(id="met", client_id="c", refresh_token="r"), **other)
        asked = TokenRecord(id="met", access_token="a")
        assert plan_update(met, asked, [own]) == (replace(met, access_token="a"), [])

    @pytest.mark.parametrize(
        ("asked", "learns"),
        [({}, False), ({"refresh_token": "r"}, False), ({"refresh_token": "R"}, True)],
        ids=str,
    )
    def test_what_brings_a_refresh_token_into_a_row_E7(self, asked, learns):
        stored = TokenRecord(id="1", refresh_token="r")
        assert learns_refresh_token(stored, TokenRecord(**asked)) is learns

    def test_saves_of_one_refresh_token_claim_the_same_whatever_else_they_know_E7(self):
        asked = TokenRecord(refresh_token="r")
        claim = claim_of(asked)
        assert claim_of(replace(asked, user_name="u", client_id="c")) == claim
        assert claim_of(replace(asked, refresh_token="R")) != claim
        assert claim != identity_of(asked)


class TestDigests:
    def test_the_stored_format_does_not_change(self):
        """A change makes every stored row unfindable, unless a migration goes with it."""
        record = TokenRecord(user_name="josé", client_id="c", refresh_token="r")
        assert digests_of(record) == {
            "identity": "39df05f9577e98e1e2be02d910b37c8c99870fb0ae090d0a78cd9ce014a25719",
            "user_digest": "6dee2d07063c1f1692ced1b030c96fb88846defe36519848b024f76c89c0eaef",
            "client_digest": "2367f2165a43a6edef4df0fb98f55317921509b0fbbc5a10dec471e84b0489ce",
            "access_digest": None,
            "refresh_digest": "49f2706f7fe0e1a9cd60435ab732c2fae1fbe62dde109c557f8c83e68aa27ca6",
            "grant_digest": None,
        }

    def test_values_do_not_run_into_each_other(self):
        digests = Digests()
        assert digests.parameter("user_name", "a") != digests.parameter("client_id", "a")
        one, other = Identity("user_name", "ab", "c"), Identity("user_name", "a", "bc")
        assert digests.identities([one]) != digests.identities([other])
