"""A search for secrets in everything that an exception, an object or a log shows of itself."""

from __future__ import annotations

import logging
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.pretty import pretty_repr
from rich.traceback import Traceback

if TYPE_CHECKING:
    from collections.abc import Iterator


def texts_of(error: BaseException) -> Iterator[str]:
    """Everything that tools are known to print of an exception, and of those behind it."""
    for each in _chain(error):
        yield from (str(each), repr(each), repr(each.args), pretty_repr(vars(each)))
    yield "".join(traceback.format_exception(error))
    with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
    yield "".join(with_locals.format())
    # What rich prints, before it breaks it into coloured lines, which takes most of the time.
    shown_by_rich = Traceback.extract(
        type(error),
        error,
        error.__traceback__,
        show_locals=True,
        locals_max_string=None,
        locals_max_length=None,
        locals_hide_dunder=False,
    )
    yield repr(shown_by_rich)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    if error is not None:
        yield error
        yield from _chain(error.__cause__)
        if error.__context__ is not error.__cause__:
            yield from _chain(error.__context__)


@contextmanager
def logs_kept(name: str = "zoho_orm_store") -> Iterator[list[str]]:
    """What a logger and those below it record meanwhile, at every level."""
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(self.format(record) + repr(vars(record)))

    logger, handler = logging.getLogger(name), Keep(logging.NOTSET)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(1)
    try:
        yield kept
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def found_in(texts: Iterator[str] | list[str], secrets: tuple[str, ...]) -> list[tuple[str, str]]:
    """Which secrets stand in which texts, but for their last four characters."""
    return [(secret, text) for text in texts for secret in secrets if secret[:-4] in text]
