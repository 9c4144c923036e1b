"""Two processes compute what one does: every case that the suite leaves out. Part of `make test-peers`."""

from pathlib import Path

from tests.parallel.judging import done, judge
from tests.parallel.work import MORE


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    done(tmp_path, MORE)
    judge(tmp_path, MORE)
