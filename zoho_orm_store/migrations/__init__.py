"""The Alembic lineage of the tables `oauthtoken` and `oauthtoken_refresh_lease`."""
