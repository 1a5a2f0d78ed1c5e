"""One refresh for many workers: whoever meets an expired token either refreshes it or waits."""
