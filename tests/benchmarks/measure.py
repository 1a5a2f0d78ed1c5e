"""Measuring one thing against another: in turns, so that a noisy machine is noisy for both."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 15
SECONDS_PER_ROUND = 0.05


@dataclass(frozen=True)
class Result:
    """How long something takes, and its yardstick; in microseconds.

    Attributes:
        what: What was measured.
        measured: How long it takes.
        against: What it was measured against.
        yardstick: How long that takes.
        budget: The most that ``measured / yardstick`` may be.
    """

    what: str
    measured: float
    against: str
    yardstick: float
    budget: float

    @property
    def ratio(self) -> float:
        return self.measured / self.yardstick

    @property
    def is_met(self) -> bool:
        return self.ratio <= self.budget


def in_turns(
    *works: Callable[[], object], clock: Callable[[], float] = perf_counter
) -> list[float]:
    """How long each piece of work takes, in microseconds: the median of rounds taken in turns.

    Args:
        works: The pieces of work.
        clock: What tells the time. Against a number of microseconds, only the time that this
            process has computed counts, not the time that other programs have had its core.
    """
    calls = [_calls_per_round(work) for work in works]
    rounds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, number, times in zip(works, calls, rounds, strict=True):
            times.append(_time(work, number, clock) / number * 1e6)
    return [median(times) for times in rounds]


def compare(
    what: str, work: Callable[[], object], against: str, other: Callable[[], object], budget: float
) -> Result:
    """Measure a piece of work against another."""
    measured, yardstick = in_turns(work, other)
    return Result(what, measured, against, yardstick, budget)


def _calls_per_round(work: Callable[[], object]) -> int:
    work()
    return max(1, round(SECONDS_PER_ROUND / max(_time(work, 3) / 3, 1e-7)))


def _time(
    work: Callable[[], object], calls: int, clock: Callable[[], float] = perf_counter
) -> float:
    started = clock()
    for _ in range(calls):
        work()
    return clock() - started
