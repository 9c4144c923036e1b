"""Files written in one step: by several processes at once, after one that was killed, on an error."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clearhead.data.writing import replacing


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    with replacing(path) as one, replacing(path) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # The last to end.
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"

    def write(number: int) -> None:
        with replacing(path) as part:
            part.write_text(str(number) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(10)))
    assert len(path.read_text()) == 1000
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    host = socket.gethostname().partition(".")[0]
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for owner in (f"{host}-{child}", f"{host}-{os.getpid()}", f"{host}x-{child}"):
        (tmp_path / f".status.json.{owner}-999.part").touch()
    with replacing(path) as part:
        part.write_text("{}")
    left = sorted(one.name for one in tmp_path.iterdir())
    assert left == sorted(
        [
            f".status.json.{host}-{os.getpid()}-999.part",
            f".status.json.{host}x-{child}-999.part",
            "status.json",
        ]
    )


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
