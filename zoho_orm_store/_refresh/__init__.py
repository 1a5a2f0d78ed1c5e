"""One refresh for many workers: a caller with an expired token either refreshes it or waits."""
