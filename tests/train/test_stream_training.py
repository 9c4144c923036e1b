"""Streamed text in training: the same rows for every arm and number of processes, on from where a checkpoint says."""

import json
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.train import stream_runs
from tests.train.stream_runs import LENGTH, ROWS, SAVE_EVERY, STEPS, recipe, together

from clearhead.data.prepare import prepare
from clearhead.data.readers import CorpusError
from clearhead.models.tasks import task_of
from clearhead.runs.rows import data_spec, describe_text
from clearhead.train.callbacks import TrainingError
from clearhead.train.comparison import prepare_rows
from clearhead.train.position import POSITION, Stream
from clearhead.train.trainer import train_job

TOTAL = STEPS * ROWS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = stream_runs.write_texts(tmp_path_factory.mktemp("stream") / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(folder.parent / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("clearhead.data.tokenizing.SHARD_BYTES", 2000)
        patch.setattr("clearhead.data.streams.SHARD_BYTES", 2000)
        patch.setattr("clearhead.data.tokenizing.BATCH_BYTES", 300)
        yield folder


@pytest.fixture(scope="module")
def expected(texts: Path) -> list[tuple[int, str]]:
    """The rows of one process, by the rows themselves: no trainer."""
    import hashlib

    asked = recipe(texts)
    job = asked.for_arm("V1", 0)
    rows = task_of("causal").rows(job, prepare(data_spec(asked)))
    found = []
    for index in range(TOTAL):
        row = rows[index]
        digest = hashlib.sha256(row["input_ids"].tobytes() + row["labels"].tobytes()).hexdigest()
        found.append((index, digest[:16]))
    return found


@pytest.fixture(scope="module")
def uninterrupted(texts: Path) -> Path:
    run = texts.parent / "one"
    assert together(texts, run, 1, texts.parent / "logs-one") == [0]
    return run


def given(logs: Path) -> list[list[tuple[int, str]]]:
    """What each rank was given, in order."""
    found = []
    for path in sorted(logs.iterdir(), key=lambda one: int(one.name)):
        pairs = (line.split() for line in path.read_text().splitlines())
        found.append([(int(index), digest) for index, digest in pairs])
    return found


def by_step(ranks: list[list[tuple[int, str]]], world: int) -> list[tuple[int, str]]:
    """The rows of all ranks in the order of steps, and of ranks within a step."""
    share = ROWS // world
    steps = max(map(len, ranks)) // share
    return [row for step in range(steps) for rank in ranks for row in rank[step * share : (step + 1) * share]]


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def test_one_process_is_given_the_rows_in_their_order(
    texts: Path, uninterrupted: Path, expected: list[tuple[int, str]]
) -> None:
    assert given(texts.parent / "logs-one") == [expected]
    assert len({digest for _, digest in expected}) > TOTAL * 0.9


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_rows_together_are_those_of_one_process(
    texts: Path, uninterrupted: Path, expected: list[tuple[int, str]], world: int, tmp_path: Path
) -> None:
    assert together(texts, tmp_path / "run", world, tmp_path / "logs") == [0] * world
    ranks = given(tmp_path / "logs")
    assert by_step(ranks, world) == expected
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_killed_at_random_steps_it_ends_with_the_same_weights(
    texts: Path, uninterrupted: Path, expected: list[tuple[int, str]], tmp_path: Path
) -> None:
    moments = random.Random(3).sample(range(2, STEPS + 1), 2)
    for number, stop in enumerate(sorted(moments)):
        logs = tmp_path / f"logs-{number}"
        assert together(texts, tmp_path / "run", 1, logs, stop) == [-signal.SIGKILL]
    assert together(texts, tmp_path / "run", 1, tmp_path / "logs-last") == [0]
    last = given(tmp_path / "logs-last")[0]
    done = (max(moments) - 1) // SAVE_EVERY * SAVE_EVERY
    assert last == expected[done * ROWS :]
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_another_number_of_processes_goes_on_at_the_same_row(
    texts: Path, uninterrupted: Path, expected: list[tuple[int, str]], tmp_path: Path
) -> None:
    """Four processes, then two, then one; each is killed behind a checkpoint, whose position names the next row."""
    begun = 0
    for world, stop in ((4, 5), (2, 8), (1, 0)):
        logs = tmp_path / f"logs-{world}"
        codes = together(texts, tmp_path / "run", world, logs, stop)
        assert codes == [-signal.SIGKILL if stop else 0] * world
        found = by_step(given(logs), world)
        assert found == expected[begun * ROWS : begun * ROWS + len(found)]
        assert found
        if stop:
            position = json.loads((newest(tmp_path / "run") / POSITION).read_text())
            begun = (stop - 1) // SAVE_EVERY * SAVE_EVERY
            assert position["rows"] == begun * ROWS and position["tokens"] == begun * ROWS * LENGTH
            assert sum(one["rows"] for one in position["sources"].values()) == position["rows"]
    assert found[-1] == expected[-1]
    assert losses(tmp_path / "run") == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_a_position_of_other_rows_or_data_is_refused(texts: Path, tmp_path: Path) -> None:
    asked = recipe(texts)
    job = asked.for_arm("V1", 0)
    data = prepare(data_spec(asked))
    stream = Stream(task_of("causal").rows(job, data), ROWS, LENGTH, data.identity)
    stream.check(tmp_path, 3)
    stream.save(tmp_path, 3)
    stream.check(tmp_path, 3)
    with pytest.raises(
        TrainingError, match=r"position\.json': the checkpoint stands behind row 12 .*\(rows\)"
    ):
        stream.check(tmp_path, 6)
    with pytest.raises(TrainingError, match=r"number of rows"):
        replace(stream, rows_per_step=8).check(tmp_path, 3)
    other = {**data.identity, "corpus": {**data.identity["corpus"], "kind": "another"}}
    with pytest.raises(TrainingError, match=r"text, tokenizer or mixture \(data\)"):
        replace(stream, identity=other).check(tmp_path, 3)


def test_positions_count_text_rows_alone(texts: Path) -> None:
    asked = recipe(texts, needle_share=0.25, pair_share=0.25, pairs_first=0.1, needles={"lengths": [24, 32]})
    job = asked.for_arm("V1", 0)
    data = prepare(data_spec(asked))
    rows = task_of("causal").rows(job, data)
    stream = Stream(rows, ROWS, LENGTH, data.identity)
    for step in range(STEPS + 1):
        counted = sum(rows.kind(index) == "text" for index in range(step * ROWS))
        assert sum(one["rows"] for one in stream.position(step)["sources"].values()) == counted
        assert all(rows[index]["input_ids"].shape == (LENGTH,) for index in range(min(step * ROWS, TOTAL)))


def test_every_job_checks_the_text_and_names_what_changed(texts: Path, tmp_path: Path) -> None:
    asked = recipe(texts)
    run = tmp_path / "run"
    run.mkdir()
    said: list[str] = []
    handed = prepare_rows(asked, run, said.append)
    assert "a run reads" in said[-1] and "web.jsonl" in said[-1]
    from clearhead.train.comparison import arm_tasks
    from clearhead.train.pool import place

    tasks = arm_tasks(asked, run)
    for task in tasks:
        place(task, handed)
    path = texts / "books" / "03.txt"
    before = path.read_text()
    try:
        path.write_text("another text " * 20)
        with pytest.raises(CorpusError, match=r"books: 03\.txt' differs"):
            train_job(tasks[1].job, tasks[1].directory)
    finally:
        path.write_text(before)


def test_what_is_said_of_a_mixture(texts: Path) -> None:
    asked = recipe(texts)
    told = describe_text(asked.for_arm("V1", 0), prepare(data_spec(asked)))
    assert "web.jsonl" in told and "books" in told and told.count(" times") == 2
    assert asked.corpus.named.endswith("books (30.0%)")
