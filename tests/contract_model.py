"""The contract once more, in the most naive way: what the stores are held against.

Written from the text of the rules, without a look at the package: dictionaries in a list, and a
loop for everything.
"""

from __future__ import annotations

TEXT = ("user", "client_id", "client_secret", "refresh_token", "grant_token", "redirect_url")


class RefusedError(Exception):
    """The contract refuses the call."""


class Model:
    """Stored tokens, as dictionaries of what is known, the one saved last at the end."""

    def __init__(self):
        self.rows = []

    def find(self, asked):
        row = self.match(asked, with_id="id" in asked)
        if row is None or self.is_new_login(asked, row):
            return None
        found = {name: row[name] for name in (*TEXT, "id") if name in row} | asked
        for name in ("access_token", "expires_in"):
            found.pop(name, None)
        return found | self.pair(asked, row)

    @staticmethod
    def is_new_login(asked, row):
        if "id" in asked or not {"user", "grant_token"} <= set(asked):
            return False
        return asked["user"] == row.get("user") and asked["grant_token"] != row.get("grant_token")

    def pair(self, asked, row):
        def of(token):
            return {k: token[k] for k in ("access_token", "expires_in") if k in token}

        if "access_token" not in asked:
            return of(row) if "access_token" in row else of(row) | of(asked)
        if asked["access_token"] == row.get("access_token"):
            return of(row) | of(asked)
        if "expires_in" in asked and "expires_in" in row:
            return of(row if int(row["expires_in"]) > int(asked["expires_in"]) else asked)
        return of(asked)

    def save(self, asked):
        row = self.match(asked, with_id="id" in asked, then_others=True)
        if row is None:
            row = self.same_identity(asked)
        if row is None:
            if not {"access_token", "refresh_token", "grant_token"} & set(asked):
                raise RefusedError
            self.rows.append(dict(asked))
            return
        if {"user"} <= set(row) & set(asked) and row["user"] != asked["user"]:
            raise RefusedError
        self.rows.remove(row)
        self.rows.append(self.tied(row, self.overwritten(row, asked), asked))

    def tied(self, row, new, asked):
        owner = None
        if "user" not in new:
            # The token's user may be known from another row: the one saved last, if several.
            owner = next((o for o in self.rows[::-1] if "user" in o and self.is_same(new, o)), None)
        others = [o for o in self.rows if o is owner or self.is_same(o, owner or new)]
        if not others:
            return new
        for other in others:
            self.rows.remove(other)
        keeper = owner or next((o for o in others if identity(o) == identity(new)), row)
        by_age = sorted([*others, row], key=lambda r: r["age"])
        combined = by_age[0]
        for later in by_age[1:]:
            combined = self.overwritten(combined, later)
        return self.overwritten(combined, asked) | {"id": keeper["id"]}

    @staticmethod
    def is_same(other, new):
        if identity(other) == identity(new):
            return True
        return (
            "user" not in other
            and other.get("client_id") in (None, new.get("client_id"))
            and "refresh_token" in new
            and other.get("refresh_token") == new["refresh_token"]
        )

    @staticmethod
    def overwritten(row, asked):
        new = row | {k: v for k, v in asked.items() if k != "id"}
        is_other = "access_token" in asked and asked["access_token"] != row.get("access_token")
        if is_other and "expires_in" not in asked:
            new.pop("expires_in", None)
        return new

    def match(self, asked, *, with_id, then_others=False):
        if with_id:
            for row in self.rows:
                if row["id"] == asked["id"]:
                    return row
            if not then_others:
                return None
        lookups = []
        if "user" in asked:
            lookups.append("user")
        if "access_token" in asked and not {"client_id", "client_secret"} & set(asked):
            lookups.append("access_token")
        lookups += [name for name in ("grant_token", "refresh_token") if name in asked]
        for lookup in lookups:
            matches = [
                row
                for row in self.rows
                if row.get(lookup) == asked[lookup]
                and all(
                    name not in row or name not in asked or row[name] == asked[name]
                    for name in ("user", "client_id")
                )
            ]
            if lookup == "user" and "client_id" in asked:
                matches = [
                    r for r in matches if r.get("client_id") == asked["client_id"]
                ] or matches
            if matches:
                return matches[-1]
        return None

    def same_identity(self, asked):
        own = identity(asked)
        for wanted in (own, (*own[:2], None)):
            for row in self.rows:
                if identity(row) == wanted and own[0] is not None:
                    return row
        return None


def identity(token):
    for kind in ("user", "refresh_token", "grant_token", "access_token"):
        if kind in token:
            return (kind, token[kind], token.get("client_id"))
    return (None, None, None)
