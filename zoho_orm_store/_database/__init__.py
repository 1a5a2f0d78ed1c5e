"""Engines, transactions and retries, the loop thread, forks, drivers, and error translation."""
