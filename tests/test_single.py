"""The loop of generators that take one pass, or a chain of passes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusegen.runtime.errors import Cancelled
from fusegen.runtime.loop.single import parts, single


@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_are_few_and_alike(count: int, most: int) -> None:
    made = parts(count, most)
    assert [i for part in made for i in part] == list(range(count))
    assert len(made) == -(-count // most) and all(0 < len(part) <= most for part in made)
    assert len({len(part) for part in made[:-1]}) <= 1


def test_each_pass_takes_what_the_one_before_gave() -> None:
    told: list[tuple[int, int]] = []
    chain = (list, lambda rows: [i * i for i in rows], sum)
    made = list(single(chain, 5, 2, progress=lambda *a: told.append(a)))
    assert made == [0 + 1, 4 + 9, 16] and told == [(2, 5), (4, 5), (5, 5)]


def test_nothing_is_run_before_it_is_asked_for() -> None:
    run: list[range] = []
    parts_made = single([run.append], 6, 2)
    assert run == []
    next(parts_made)
    assert run == [range(2)]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_cancelling_is_heeded_between_two_passes(after: int) -> None:
    event, run = threading.Event(), list[str]()

    def passing(name: str) -> None:
        run.append(name)
        if len(run) == after:
            event.set()

    if after == 0:
        event.set()
    with pytest.raises(Cancelled, match=f"after {2 if after >= 2 else 0} of 4 samples"):
        list(single([lambda _: passing("first"), lambda _: passing("second")], 4, 2, cancel=event))
    assert run == ["first", "second", "first"][:after]
