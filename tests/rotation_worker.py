"""Rotate keys, and be killed after a number of tokens: python rotation_worker.py URL NUMBER."""

from __future__ import annotations

import os
import signal
import sys

from zoho_orm_store import FernetCipher, rotate_keys


def rotate(url: str, killed_at: str) -> None:
    def on_progress(done: int, of: int) -> None:
        if done >= int(killed_at):
            os.kill(os.getpid(), signal.SIGKILL)

    rotate_keys(url, FernetCipher(), encrypt_plain_text=True, on_progress=on_progress)


if __name__ == "__main__":
    rotate(*sys.argv[1:])
