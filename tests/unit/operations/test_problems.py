"""Problems come from the thread that walks a map and from those that read, and none is left out."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from blocksnap.errors import DamageError
from blocksnap.operations.problems import MoreProblemsError, Problems


class SlowCount(int):
    """Lets another thread run while it is added to a sum."""

    def __radd__(self, other: int) -> int:
        time.sleep(0.05)
        return other + int(self)


def numbers(found: list[DamageError]) -> list[int]:
    return [int(err.brief) for err in found]


def test_the_first_thousand_are_held_and_the_rest_is_counted() -> None:
    problems = Problems()
    for number in range(1000):
        problems.add(DamageError(str(999 - number)))
    assert numbers(problems.told()) == list(range(999, -1, -1))
    problems.add(DamageError("1000"), 7)
    *first, more = problems.told(lambda err: int(err.brief))
    assert numbers(first) == list(range(1000))
    assert isinstance(more, MoreProblemsError)
    assert more.places == 7


def test_what_several_threads_find_at_once_is_all_counted() -> None:
    problems = Problems()
    for number in range(1000):
        problems.add(DamageError(str(number)))
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(problems.add, DamageError("one more"), SlowCount(10))
    *_, more = problems.told()
    assert isinstance(more, MoreProblemsError)
    assert more.places == 40
