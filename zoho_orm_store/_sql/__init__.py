"""The SQL: statements on tokens and leases, and how dialects differ."""
