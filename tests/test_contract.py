"""The behaviour contract, rule by rule: in memory, on every database, and through every driver."""

from __future__ import annotations

import logging

import pytest
from conftest import (
    BY_DATABASE,
    BY_DRIVER,
    ENGINES,
    in_memory,
    on_each_driver,
    on_each_driver_and_engine,
    on_routes,
    open_store,
    statements_counted,
    with_a_cipher_too,
)
from sdk_releases import fails_before
from sdk_tokens import FIELDS, FULL, known, make_token, save

from zoho_orm_store._sdk.conversion import OAuthToken, SDKException

HOSTILE = (
    "o'brien@example.com",
    "x' or '1'='1",
    "1 or 1=1",
    '"; drop table oauthtoken; --',
    "100%",
    "%s %(a)s {b} :c ?",
    "back\\slash",
    "trailing ",
    " leading",
    "tab\tand\nnewline",
    "José",
    "Jose\u0301",
    "\U0001f511 key",
    "ß",
    "\u202eright-to-left",
    "NULL",
    "a" * 255,
)
"""Values that stores built on string concatenation or loose collations get wrong."""

ALIKE = ("a", "A", "á", "a\u0301", "a ", " a", "aa", "ａ")
"""Values that the default collation of some database takes for equal."""


def stored(store):
    return [known(token) for token in store.get_tokens()]


class TestValues:
    def test_empty_strings_are_unknown_A1(self, store):
        saved = save(store, **FULL, grant_token="")
        save(
            store, id=saved.get_id(), user="", access_token="1000.new", expires_in="", api_domain=""
        )
        found = store.find_token_by_id(saved.get_id())
        assert found.get_grant_token() is None
        assert found.get_user_signature().get_name() == FULL["user"]
        assert found.get_api_domain() == FULL["api_domain"]
        assert found.get_expires_in() is None
        assert store.find_token(make_token(user="")) is None

    @on_each_driver_and_engine
    def test_every_field_comes_back_exactly_A2(self, store):
        for value in HOSTILE:
            names = ("client_secret", "refresh_token", "access_token", "grant_token")
            fields = dict.fromkeys((*names, "redirect_url", "api_domain", "client_id"), value)
            token = save(store, id=value, user=value, **fields)
            found = store.find_token_by_id(value)
            assert token.get_id() == found.get_id() == value
            assert found.get_user_signature().get_name() == value
            assert {name: getattr(found, f"get_{name}")() for name in fields} == fields

    def test_ids_are_compared_byte_for_byte_A2(self, store):
        for value in ALIKE:
            save(store, id=value, user=f"user {value!r}", access_token=value)
        for value in ALIKE:
            assert store.find_token_by_id(value).get_access_token() == value
        store.delete_token("a")
        assert {token.get_id() for token in store.get_tokens()} == set(ALIKE) - {"a"}

    @pytest.mark.parametrize("field", ["user", "refresh_token", "access_token", "grant_token"])
    @with_a_cipher_too
    def test_lookups_are_compared_byte_for_byte_A2(self, store, field):
        ids = {
            value: save(store, **{"access_token": f"t {value}", field: value}).get_id()
            for value in ALIKE
        }
        assert len(set(ids.values())) == len(ALIKE)
        for value in ALIKE:
            asked = make_token(**{field: value})
            assert store.find_token(asked).get_id() == ids[value]
        assert store.find_token(make_token(**{field: "b"})) is None

    def test_clients_are_compared_byte_for_byte_A2(self, store):
        for value in ALIKE:
            save(store, user="u", client_id=value, access_token=value)
        for value in ALIKE:
            found = store.find_token(make_token(user="u", client_id=value))
            assert found.get_access_token() == value

    @on_each_driver
    def test_expiry_comes_back_as_the_same_string_A3(self, store):
        for expiry in ("0", "1", "-1", "1767225600000", str(2**63 - 1), str(-(2**63))):
            saved = save(store, user="u", access_token="a", expires_in=expiry)
            assert store.find_token_by_id(saved.get_id()).get_expires_in() == expiry

    @in_memory
    def test_expiry_that_is_no_integer_is_refused_A3(self, store):
        saved = save(store, **FULL)
        texts = ("soon", "1.5", "1e3", " 1", "1 ", "1_000", "+1", "01", "٣", "0x10", str(2**63))
        for expiry in (*texts, 1.5, True):
            with pytest.raises(SDKException, match="epoch milliseconds"):
                save(store, id=saved.get_id(), access_token="new", expires_in=expiry)
        assert stored(store) == [known(make_token(**FULL))]

    @on_each_driver_and_engine
    def test_the_longest_value_is_kept_and_a_longer_one_refused_A4(self, store):
        limits = dict.fromkeys(FIELDS, 4096) | {"id": 255, "client_id": 255, "user": 512}
        del limits["expires_in"]
        for field, limit in limits.items():
            longest = "\U0001f511" * limit
            save(store, **{"access_token": "a", field: longest})
            kept = store.get_tokens()
            assert len(kept) == 1
            assert longest in (kept[0].get_id(), *known(kept[0]).values())
            store.delete_tokens()
            with pytest.raises(SDKException) as refused:
                save(store, **{"access_token": "a", field: "x" * (limit + 1)})
            assert {"user": "user_name"}.get(field, field) in str(refused.value)
            assert str(limit) in str(refused.value)
            assert "xxxx" not in str(refused.value)
            assert store.get_tokens() == []

    @on_each_driver
    def test_nul_and_lone_surrogates_are_refused_A4(self, store):
        for field in ("id", "user", "client_id", "refresh_token", "api_domain"):
            for bad in ("a\0b", "\ud800", "a\udfff"):
                with pytest.raises(SDKException, match="NUL character or a lone surrogate"):
                    save(store, **{"access_token": "a", field: bad})
                assert store.get_tokens() == []
                assert store.find_token(make_token(**{field: bad})) is None
                assert store.find_token_by_id(bad) is None
                store.delete_token(bad)

    @in_memory
    def test_a_value_that_is_no_string_is_refused_A4(self, store):
        for field in ("client_id", "refresh_token", "redirect_url"):
            with pytest.raises(SDKException, match=f"{field} must be a string"):
                save(store, **{"access_token": "a", field: 7})
        assert store.get_tokens() == []


class TestMatching:
    def test_the_id_decides_alone_B1_B9(self, store):
        first = save(store, user="u", access_token="a1")
        save(store, user="v", access_token="a2")
        asked = make_token(id=first.get_id(), user="v", access_token="a2")
        assert store.find_token(asked).get_id() == first.get_id()
        assert store.find_token(make_token(id="unknown", user="u", access_token="a1")) is None

    def test_the_users_own_client_then_an_unknown_one_B2(self, store):
        unknown = save(store, user="u", access_token="a0")
        own = save(store, user="v", client_id="c", access_token="a1")
        assert store.find_token(make_token(user="u", client_id="c")).get_id() == unknown.get_id()
        save(store, user="v", client_id="d", access_token="a2")
        assert store.find_token(make_token(user="v", client_id="c")).get_id() == own.get_id()
        assert store.find_token(make_token(user="v", client_id="e")) is None

    def test_own_client_wins_over_a_newer_unknown_one_B2(self, store):
        own = save(store, id="1", user="u", client_id="c", access_token="a1")
        newer = save(store, id="2", user="w", access_token="a2")
        assert own.get_id() != newer.get_id()
        save(store, user="x", client_id="c", access_token="a3")
        assert store.find_token(make_token(user="u", client_id="c")).get_id() == "1"

    def test_access_token_without_any_client_B3(self, store):
        saved = save(store, **FULL)
        assert store.find_token(make_token(access_token="1000.access")).get_id() == saved.get_id()
        for client in ({"client_id": FULL["client_id"]}, {"client_secret": "s"}):
            assert store.find_token(make_token(access_token="1000.access", **client)) is None

    def test_grant_token_B4_and_refresh_token_B5(self, store):
        by_grant = save(store, user="u", grant_token="g", access_token="a1")
        by_refresh = save(store, user="v", refresh_token="r", access_token="a2")
        client = {"client_id": "c", "client_secret": "s"}
        assert store.find_token(make_token(grant_token="g", **client)).get_id() == by_grant.get_id()
        found = store.find_token(make_token(refresh_token="r", **client))
        assert found.get_id() == by_refresh.get_id()
        both = make_token(grant_token="g", refresh_token="r")
        assert store.find_token(both).get_id() == by_grant.get_id()

    def test_a_rung_that_misses_leaves_it_to_the_next_B(self, store):
        saved = save(store, refresh_token="r", access_token="a")
        asked = make_token(user="nobody yet", grant_token="spent", refresh_token="r")
        assert store.find_token(asked).get_id() == saved.get_id()

    @pytest.mark.parametrize("lookup", ["access_token", "grant_token", "refresh_token"])
    def test_a_match_never_crosses_users_B6(self, store, lookup):
        save(store, user="u", **{"access_token": "a", lookup: "t"})
        assert store.find_token(make_token(user="v", **{lookup: "t"})) is None
        assert store.find_token(make_token(**{lookup: "t"})) is not None

    @pytest.mark.parametrize("lookup", ["grant_token", "refresh_token"])
    def test_a_match_never_crosses_clients_B6(self, store, lookup):
        save(store, client_id="c", **{"access_token": "a", lookup: "t"})
        assert store.find_token(make_token(client_id="d", **{lookup: "t"})) is None
        assert store.find_token(make_token(client_id="c", **{lookup: "t"})) is not None

    def test_the_one_saved_last_B7(self, store):
        first = save(store, user="u", client_id="c", access_token="a1")
        second = save(store, user="u", client_id="d", access_token="a2")
        assert store.find_token(make_token(user="u")).get_id() == second.get_id()
        save(store, user="u", client_id="c", access_token="a3")
        assert store.find_token(make_token(user="u")).get_id() == first.get_id()

    def test_no_rung_no_match_B8(self, store):
        save(store, **FULL)
        for asked in (
            make_token(),
            make_token(client_id=FULL["client_id"], client_secret=FULL["client_secret"]),
            make_token(redirect_url=FULL["redirect_url"], api_domain=FULL["api_domain"]),
        ):
            before = vars(asked).copy()
            assert store.find_token(asked) is None
            assert vars(asked) == before

    def test_a_save_with_an_unknown_id_goes_by_the_other_rungs_B9(self, store):
        saved = save(store, user="u", access_token="a1")
        again = save(store, id="vanished", user="u", access_token="a2")
        assert again.get_id() == saved.get_id()
        assert stored(store) == [{"user_name": "u", "access_token": "a2"}]

    def test_one_refresh_token_of_two_users_is_two_tokens_B10(self, store):
        first = save(store, user="tenant-1", refresh_token="r", access_token="a1")
        second = save(store, user="tenant-2", refresh_token="r", access_token="a2")
        assert first.get_id() != second.get_id()
        for user, token in (("tenant-1", "a1"), ("tenant-2", "a2")):
            found = store.find_token(make_token(user=user, refresh_token="r"))
            assert found.get_access_token() == token


class TestFind:
    @in_memory
    def test_fills_the_unknown_fields_of_the_same_object_C1(self, store):
        saved = save(store, **FULL)
        asked = make_token(user=FULL["user"], redirect_url="https://mine.example")
        assert store.find_token(asked) is asked
        assert asked.get_id() == saved.get_id()
        expected = known(make_token(**FULL)) | {"redirect_url": "https://mine.example"}
        assert known(asked) == expected

    @in_memory
    def test_no_match_leaves_the_token_as_it_was_C1(self, store):
        save(store, **FULL)
        asked = make_token(user="someone else", client_id="c", expires_in="5")
        before = vars(asked).copy()
        assert store.find_token(asked) is None
        assert vars(asked) == before

    @in_memory
    def test_access_token_and_expiry_are_one_pair_C2(self, store):
        cases = [
            ((None, None), ("a", "5"), ("a", "5")),
            ((None, "9"), ("a", "5"), ("a", "5")),
            ((None, None), ("a", None), ("a", None)),
            ((None, "9"), ("a", None), ("a", None)),
            (("a", None), ("a", "5"), ("a", "5")),
            (("a", "9"), ("a", "5"), ("a", "9")),
            (("b", "9"), ("a", "5"), ("b", "9")),
            (("b", "5"), ("a", "9"), ("a", "9")),
            (("b", "5"), ("a", "5"), ("b", "5")),
            (("b", None), ("a", "9"), ("b", None)),
            (("b", "5"), ("a", None), ("b", "5")),
        ]
        for asked, stored_pair, expected in cases:
            store.delete_tokens()
            save(store, user="u", access_token=stored_pair[0], expires_in=stored_pair[1])
            token = make_token(user="u", access_token=asked[0], expires_in=asked[1])
            assert store.find_token(token) is token
            assert (token.get_access_token(), token.get_expires_in()) == expected, asked

    def test_by_nothing_but_an_id_C3(self, store):
        save(store, user="other", access_token="x", refresh_token="y")
        saved = save(store, **FULL)
        asked = OAuthToken(id=saved.get_id())
        assert store.find_token(asked) is asked
        assert asked.get_refresh_token() == FULL["refresh_token"]

    @in_memory
    def test_what_is_no_token_is_refused_C4(self, store):
        for wrong in (None, "a string", 7, object()):
            with pytest.raises(SDKException, match="must be an OAuthToken") as refused:
                store.find_token(wrong)
            assert type(wrong).__name__ in str(refused.value)
            with pytest.raises(SDKException, match="must be an OAuthToken"):
                store.save_token(wrong)


class TestFindById:
    @with_a_cipher_too
    def test_a_new_and_complete_token_D1(self, store):
        saved = save(store, **FULL, grant_token="g")
        found = store.find_token_by_id(saved.get_id())
        assert found is not saved
        assert known(found) == known(saved)
        assert vars(found).keys() == vars(OAuthToken(id="x")).keys()

    def test_a_token_that_knows_little_is_complete_too_D1(self, store):
        saved = save(store, access_token="a")
        found = store.find_token_by_id(saved.get_id())
        assert known(found) == {"access_token": "a"}
        assert vars(found).keys() == vars(OAuthToken(id="x")).keys()

    def test_unknown_id_is_none_D2(self, store):
        save(store, **FULL)
        for unknown in ("nope", "", None, "x" * 300):
            assert store.find_token_by_id(unknown) is None

    @in_memory
    def test_unknown_id_raises_the_sdks_own_message_D2(self, route, route_url):
        with open_store(route, route_url, missing_id="raise") as store:
            with pytest.raises(SDKException, match="Given Id is invalid") as raised:
                store.find_token_by_id("nope")
            assert raised.value.code == "TOKEN_STORE"
            saved = save(store, **FULL)
            assert store.find_token_by_id(saved.get_id()) is not None

    @in_memory
    def test_an_id_that_is_no_string_is_refused_D(self, store):
        with pytest.raises(SDKException, match="id must be a string, not int"):
            store.find_token_by_id(7)

    @on_routes(*BY_DATABASE, *ENGINES)
    def test_it_is_one_select_D(self, store):
        saved = save(store, **FULL)
        store.find_token_by_id(saved.get_id())
        with statements_counted() as statements:
            store.find_token_by_id(saved.get_id())
        assert [statement.split()[0] for statement in statements] == ["SELECT"]


class TestSave:
    @with_a_cipher_too
    def test_known_fields_overwrite_and_unknown_ones_stay_E1(self, store):
        saved = save(store, **FULL)
        save(store, id=saved.get_id(), refresh_token="1000.other", redirect_url="https://new")
        expected = known(make_token(**FULL))
        expected |= {"refresh_token": "1000.other", "redirect_url": "https://new"}
        assert stored(store) == [expected]

    @with_a_cipher_too
    def test_a_new_access_token_clears_the_old_ones_expiry_E1(self, store):
        saved = save(store, **FULL)
        save(store, id=saved.get_id(), access_token=FULL["access_token"])
        assert store.find_token_by_id(saved.get_id()).get_expires_in() == FULL["expires_in"]
        save(store, id=saved.get_id(), access_token="1000.new")
        assert store.find_token_by_id(saved.get_id()).get_expires_in() is None

    def test_a_new_row_gets_an_id_E2(self, store):
        tokens = [save(store, user=f"u{n}", access_token="a") for n in range(3)]
        ids = [token.get_id() for token in tokens]
        assert all(ids)
        assert len(set(ids)) == 3
        assert [token.get_id() for token in store.get_tokens()] == ids

    def test_a_new_row_keeps_the_tokens_own_id_E2(self, store):
        assert save(store, id="mine", access_token="a").get_id() == "mine"
        assert store.find_token_by_id("mine").get_access_token() == "a"

    @in_memory
    def test_nothing_to_store_is_refused_E3(self, store):
        for fields in ({"id": "x"}, {"user": "u"}, {"client_id": "c", "client_secret": "s"}, {}):
            with pytest.raises(SDKException, match="nothing to store"):
                save(store, **fields)
        assert store.get_tokens() == []

    @pytest.mark.parametrize(
        "identity",
        [
            {"user": "u", "client_id": "c"},
            {"user": "u"},
            {"refresh_token": "r", "client_id": "c"},
            {"refresh_token": "r"},
            {"grant_token": "g", "client_id": "c", "client_secret": "s"},
            {"grant_token": "g"},
            {"access_token": "a", "client_id": "c"},
            {"access_token": "a"},
        ],
        ids=" ".join,
    )
    def test_one_identity_one_row_E4(self, store, identity):
        ids = set()
        for n in range(3):
            token = save(store, **{"access_token": f"a{n}"} | identity)
            ids.add(token.get_id())
        assert len(ids) == 1
        assert len(store.get_tokens()) == 1

    @with_a_cipher_too
    def test_the_user_learned_later_moves_the_identity_E4(self, store):
        first = save(store, client_id="c", refresh_token="r", access_token="a1")
        learned = save(store, client_id="c", user="u", refresh_token="r", access_token="a2")
        assert learned.get_id() == first.get_id()
        by_user = make_token(user="u", client_id="c")
        assert store.find_token(by_user).get_access_token() == "a2"
        other = save(store, client_id="c", user="v", refresh_token="r", access_token="a3")
        assert other.get_id() != first.get_id()

    @with_a_cipher_too
    def test_the_client_learned_later_moves_the_identity_E4(self, store):
        first = save(store, user="u", access_token="a1")
        assert save(store, user="u", client_id="c", access_token="a2").get_id() == first.get_id()
        other = save(store, user="u", client_id="d", access_token="a3")
        assert other.get_id() != first.get_id()
        assert len(store.get_tokens()) == 2

    @with_a_cipher_too
    def test_the_refresh_token_learned_later_moves_the_identity_E4(self, store):
        first = save(store, grant_token="g", client_id="c", client_secret="s")
        second = save(store, grant_token="g", client_id="c", refresh_token="r", access_token="a")
        assert second.get_id() == first.get_id()
        again = save(store, client_id="c", refresh_token="r", access_token="b")
        assert again.get_id() == first.get_id()

    @with_a_cipher_too
    def test_two_rows_that_turn_out_to_be_one_become_one_E4(self, store):
        own = save(
            store, user="u", client_id="c", refresh_token="old", access_token="a1", api_domain="d"
        )
        userless = save(
            store, client_id="c", refresh_token="new", access_token="a2", redirect_url="r"
        )
        assert own.get_id() != userless.get_id()
        tied = save(
            store, user="u", client_id="c", refresh_token="new", access_token="a3", expires_in="3"
        )
        assert tied.get_id() == own.get_id()
        assert stored(store) == [
            {
                "user_name": "u",
                "client_id": "c",
                "refresh_token": "new",
                "access_token": "a3",
                "expiry_time": 3,
                "api_domain": "d",
                "redirect_url": "r",
            }
        ]

    @with_a_cipher_too
    def test_an_id_that_turns_out_to_be_a_users_other_row_E4(self, store):
        save(store, user="u", client_id="c", refresh_token="r1", access_token="a1")
        userless = save(store, client_id="c", refresh_token="r2", access_token="a2")
        tied = make_token(
            id=userless.get_id(), user="u", client_id="c", refresh_token="r2", access_token="a3"
        )
        store.save_token(tied)
        tokens = store.get_tokens()
        assert [token.get_id() for token in tokens] == [tied.get_id()]
        assert known(tokens[0])["access_token"] == "a3"
        assert known(tokens[0])["refresh_token"] == "r2"

    def test_rows_of_other_clients_are_not_drawn_in_E4(self, store):
        save(store, client_id="d", refresh_token="r", access_token="a1")
        save(store, user="u", client_id="c", refresh_token="r", access_token="a2")
        save(store, user="u", client_id="c", refresh_token="r", access_token="a3")
        assert len(store.get_tokens()) == 2

    def test_another_users_id_is_refused_E5(self, store):
        first = save(store, **FULL)
        before = stored(store)
        with pytest.raises(SDKException, match="belongs to user"):
            save(store, id=first.get_id(), user="eve", access_token="evil", refresh_token="evil")
        assert stored(store) == before

    @in_memory
    def test_it_returns_none_and_logs_what_it_raises_E8(self, store, caplog):
        assert store.save_token(make_token(**FULL)) is None
        with caplog.at_level(logging.ERROR, "zoho_orm_store"), pytest.raises(SDKException):
            save(store, user="u")
        assert [record.name for record in caplog.records] == ["zoho_orm_store"]
        assert "nothing to store" in caplog.text


class TestDeleteAndList:
    @on_each_driver
    def test_exactly_the_row_with_that_id_F1(self, store):
        save(store, id="other", user="other", access_token="b")
        for hostile in HOSTILE:
            save(store, id=hostile, user="u", access_token="a")
            store.delete_token(hostile)
            assert [token.get_id() for token in store.get_tokens()] == ["other"]

    def test_an_unknown_id_is_no_error_F1(self, store):
        save(store, **FULL)
        for unknown in ("nope", "", None, "%", "_", "*", "1 or 1=1"):
            store.delete_token(unknown)
        assert len(store.get_tokens()) == 1

    @on_routes(*BY_DRIVER)
    def test_all_in_one_statement_F2(self, store):
        for n in range(3):
            save(store, user=f"u{n}", access_token="a")
        with statements_counted() as statements:
            store.delete_tokens()
        deletions = [s for s in statements if s.startswith("DELETE")]
        assert len(deletions) == 1
        assert store.get_tokens() == []
        save(store, **FULL)
        assert len(store.get_tokens()) == 1

    @with_a_cipher_too
    def test_oldest_first_and_complete_F3(self, store):
        assert store.get_tokens() == []
        for n in range(12):
            save(store, **FULL | {"user": f"u{n}", "refresh_token": f"r{n}"})
        save(store, user="u3", client_id=FULL["client_id"], access_token="newer")
        tokens = store.get_tokens()
        assert [known(token)["user_name"] for token in tokens] == [f"u{n}" for n in range(12)]
        for token in tokens:
            assert vars(token).keys() == vars(OAuthToken(id="x")).keys()


@in_memory
class TestErrors:
    def test_the_operation_is_named_and_the_cause_attached_G1(self, store):
        for operation, call in {
            "find_token": lambda: store.find_token(None),
            "save_token": lambda: store.save_token(None),
            "find_token_by_id": lambda: store.find_token_by_id(7),
            "delete_token": lambda: store.delete_token(7),
        }.items():
            with pytest.raises(SDKException) as raised:
                call()
            assert raised.value.code == "TOKEN_STORE"
            assert f"Exception in {operation} - {type(store).__name__}" in str(raised.value)
            assert raised.value.__cause__ is raised.value.cause
            assert type(raised.value.cause).__name__ == "InvalidTokenError"


class TestDefectsOfTheReferenceStores:
    """What the SDK's own stores get wrong, as measured: one test for each."""

    def test_twelve_users_saved_one_after_another(self, store):
        for n in range(12):
            save(store, user=f"u{n}", refresh_token=f"r{n}", access_token=f"a{n}")
        assert len({token.get_id() for token in store.get_tokens()}) == 12

    def test_saving_the_same_values_again(self, store):
        first, second = save(store, **FULL), save(store, **FULL)
        assert first.get_id() == second.get_id()
        assert len(store.get_tokens()) == 1

    def test_user_name_discovered_after_the_first_save(self, store):
        token = save(store, client_id="c", client_secret="s", refresh_token="r", access_token="a")
        fields = {"client_id": "c", "client_secret": "s", "refresh_token": "r"}
        save(store, id=token.get_id(), user="u", access_token="a", **fields)
        assert stored(store) == [{"user_name": "u", "access_token": "a", **fields}]

    def test_same_user_with_two_clients(self, store):
        save(store, user="u", client_id="c1", access_token="a1")
        save(store, user="u", client_id="c2", access_token="a2")
        for client, access in (("c1", "a1"), ("c2", "a2")):
            found = store.find_token(make_token(user="u", client_id=client))
            assert found.get_access_token() == access

    def test_accented_user_asked_for(self, store):
        save(store, user="jose@x", access_token="a")
        assert store.find_token(make_token(user="josé@x")) is None

    def test_user_name_with_a_quote(self, store):
        save(store, user="o'brien@example.com", access_token="a")
        found = store.find_token(make_token(user="o'brien@example.com"))
        assert found.get_access_token() == "a"

    def test_user_name_that_is_sql(self, store):
        save(store, **FULL)
        assert store.find_token(make_token(user="x' or '1'='1")) is None

    def test_empty_user_name_asked_for(self, store):
        save(store, **FULL)
        assert store.find_token(make_token(user="")) is None

    def test_id_only_token_asked_for(self, store):
        save(store, user="u1", refresh_token="r1", access_token="a1")
        second = save(store, user="u2", refresh_token="r2", access_token="a2")
        asked = OAuthToken(id=second.get_id())
        store.find_token(asked)
        assert asked.get_refresh_token() == "r2"
        assert store.find_token(OAuthToken(id="whatever")) is None

    def test_refresh_token_asked_for_with_another_clients_id(self, store):
        save(store, **FULL)
        asked = OAuthToken("another", "secret", refresh_token=FULL["refresh_token"])
        assert store.find_token(asked) is None

    def test_delete_token_with_sql(self, store):
        save(store, **FULL)
        store.delete_token("1 or 1=1")
        assert len(store.get_tokens()) == 1

    def test_delete_tokens(self, store):
        save(store, **FULL)
        store.delete_tokens()
        assert store.get_tokens() == []

    def test_constructing_the_store_again_on_an_empty_table(self, route, route_url, store):
        with open_store(route, route_url) as second:
            assert second.get_tokens() == []
            save(second, **FULL)
            assert len(second.get_tokens()) == 1

    @fails_before((6, 0), "5.0 has no such field")
    def test_tokens_of_get_tokens_have_every_private_field(self, store):
        save(store, **FULL)
        token = store.get_tokens()[0]
        assert vars(token)["_OAuthToken__find_user"] is True

    def test_a_refresh_token_of_301_characters(self, store):
        long = "1000." + "r" * 296
        saved = save(store, user="u", refresh_token=long)
        assert store.find_token_by_id(saved.get_id()).get_refresh_token() == long
