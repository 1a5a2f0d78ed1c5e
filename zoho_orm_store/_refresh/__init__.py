"""One refresh for many workers: a caller that meets an expired token either refreshes it or waits."""
