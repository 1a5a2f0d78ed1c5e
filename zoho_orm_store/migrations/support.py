"""What revisions may import of this package. What is here keeps its meaning for ever."""

from __future__ import annotations

from zoho_orm_store._database.errors import our_errors as without_values

__all__ = ["without_values"]
