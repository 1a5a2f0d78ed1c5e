"""What revisions may import of this package. What is here keeps its meaning for ever."""

from __future__ import annotations

from zoho_orm_store.dialects import with_our_errors as without_values

__all__ = ["without_values"]
