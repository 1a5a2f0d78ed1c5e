"""Run the command line as ``python -m zoho_orm_store``."""

from zoho_orm_store.cli import main

main()
