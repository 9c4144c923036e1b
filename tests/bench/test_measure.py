"""The statistics of interleaved rounds, on a clock that the peers move themselves."""

import pytest

from clearhead.bench.measure import Spread, WallTimer, interleaved, ratios, spread, warm_up


class Clock:
    """Time that passes only when a peer runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


def test_a_slow_machine_moves_the_times_and_not_the_ratios() -> None:
    clock = Clock()
    costs = {"twin": 1.0, "fast": 0.5, "slow": 3.0}

    def peer(name: str) -> None:
        # Every round the machine is slower than before.
        clock.run(name, costs[name] * (1 + len(clock.calls) // 3))

    rounds = list(interleaved({name: lambda name=name: peer(name) for name in costs}, 5, WallTimer(clock)))  # type: ignore[misc]
    assert spread([found["twin"] for found in rounds]) == Spread(3.0, 2.0, 4.0, 1.0)
    assert ratios(rounds, "fast", "twin") == Spread(0.5, 0.5, 0.5, 0.5)
    assert ratios(rounds, "slow", "twin") == Spread(3.0, 3.0, 3.0, 3.0)
    assert ratios(rounds, "twin", "twin").median == 1.0


def test_every_round_begins_with_another_peer() -> None:
    clock = Clock()
    calls = {name: lambda name=name: clock.run(name, 1.0) for name in "abc"}  # type: ignore[misc]
    assert len(list(interleaved(calls, 4, WallTimer(clock)))) == 4
    assert "".join(clock.calls) == "abcbcacababc"


def test_only_whole_rounds_are_given() -> None:
    clock = Clock()

    def interrupt() -> None:
        clock.run("b", 1.0)
        if clock.calls.count("b") == 3:
            raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        for found in interleaved({"a": lambda: clock.run("a", 1.0), "b": interrupt}, 9, WallTimer(clock)):
            done.append(found)
    assert done == [{"a": 1.0, "b": 1.0}] * 2


def test_the_ratio_is_the_median_of_ratios() -> None:
    rounds = [{"x": 4.0, "base": 1.0}, {"x": 2.0, "base": 2.0}, {"x": 9.0, "base": 3.0}]
    assert ratios(rounds, "x", "base") == Spread(3.0, 2.0, 3.5, 1.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)


def test_warm_up_names_who_cannot_run() -> None:
    def too_large() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    def broken() -> None:
        raise RuntimeError("no such thing\nand a trace")

    assert warm_up({"fine": lambda: None, "large": too_large, "broken": broken}) == {
        "large": "it needs more memory than is free",
        "broken": "RuntimeError: no such thing",
    }
