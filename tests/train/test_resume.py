"""An interrupted run that is called again ends with the weights of one that was not; several processes train as one."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train import small
from tests.train.small import SAVE_EVERY, STEPS

from clearhead.models.autoload import MODULE_FILE
from clearhead.runs.files import BrokenFile
from clearhead.runs.status import read_status
from clearhead.train import checkpoint, trainer
from clearhead.train.checkpoint import MARKER, newest_complete
from clearhead.train.pool import TrainingTask, place

# Seconds until a test gives up on a process; none is expected to take nearly as long.
PATIENCE = 300


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_corpus(tmp_path_factory.mktemp("project") / "corpus")


@pytest.fixture(scope="module")
def environment(corpus: Path) -> Iterator[dict[str, str]]:
    changed = {"CLEARHEAD_CACHE": str(corpus.parent / "cache"), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        yield changed


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, environment: dict[str, str]) -> Path:
    run = corpus.parent / "uninterrupted"
    small.train(corpus, run, {})
    return run


class Stopped(Exception):
    """Training was meant to end there."""


@pytest.fixture(scope="module")
def stopped(corpus: Path, environment: dict[str, str]) -> Path:
    """A run that ended after its third checkpoint; two are kept."""
    run = corpus.parent / "stopped"
    drop = trainer.drop_old

    def stop(folder: Path, keep: int, kept: tuple[int, ...]) -> None:
        drop(folder, keep, kept)
        if (folder / f"checkpoint-{3 * SAVE_EVERY}").exists():
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "drop_old", stop)
        with pytest.raises(Stopped):
            small.train(corpus, run, {})
    return run


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def newest(run: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = newest_complete(run / "checkpoints", said.append)
    return (None if found is None else found.name), said


def test_a_killed_run_ends_with_the_same_weights(
    corpus: Path, environment: dict[str, str], uninterrupted: Path
) -> None:
    run = corpus.parent / "killed"
    killed = small.process(small.train_until_killed, corpus, run, environment, 2 * SAVE_EVERY)
    killed.join(PATIENCE)
    assert killed.exitcode == -signal.SIGKILL
    assert not (run / "model").exists()
    left = run / "checkpoints"
    assert {path.name for path in left.iterdir()} == {f"checkpoint-{n * SAVE_EVERY}" for n in (1, 2)}
    written = [path for path in left.rglob("*") if path.is_file() and path.name != MODULE_FILE]
    assert {path.suffix for path in written} <= {".json", ".safetensors", ""}

    assert newest(run)[0] == f"checkpoint-{SAVE_EVERY}"
    small.train(corpus, run, {})
    assert weights(run) == weights(uninterrupted)
    assert losses(run) == losses(uninterrupted)


def test_two_processes_train_as_one(corpus: Path, environment: dict[str, str], uninterrupted: Path) -> None:
    run = corpus.parent / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    small.task(corpus, run)
    both = [
        small.process(small.train, corpus, run, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for one in both:
        one.join(PATIENCE)
    assert [one.exitcode for one in both] == [0, 0]
    one, two = losses(uninterrupted), losses(run)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert max(abs(a - b) / a for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-4


def flip(path: Path) -> None:
    """Change 400 bytes in the middle: the file is as long as before and still opens."""
    content = bytearray(path.read_bytes())
    middle = len(content) - 401
    content[middle : middle + 400] = bytes(byte ^ 255 for byte in content[middle : middle + 400])
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}
FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "random-0.safetensors")


@pytest.mark.parametrize("file", [*FILES, "trainer_state.json", "config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(copy: Path, damage: str, file: str) -> None:
    last = copy / "checkpoints" / f"checkpoint-{3 * SAVE_EVERY}"
    DAMAGES[damage](last / file)
    found, said = newest(copy)
    assert found == f"checkpoint-{2 * SAVE_EVERY}"
    assert len(said) == 1
    assert str(last) in said[0]
    assert file in said[0]
    assert (last.parent / f"damaged-{last.name}").exists()
    assert not last.exists()


@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.pt", "pytorch_model.bin", "rng_state.pth", "x.pkl"])
def test_a_planted_pickle_is_not_read(copy: Path, name: str) -> None:
    (copy / "checkpoints" / f"checkpoint-{3 * SAVE_EVERY}" / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    found, said = newest(copy)
    assert found == f"checkpoint-{2 * SAVE_EVERY}"
    assert name in said[0]
    assert "nothing is unpickled" in said[0]


def test_what_follows_a_damage_equals_an_uninterrupted_run(
    corpus: Path, copy: Path, uninterrupted: Path
) -> None:
    flip(copy / "checkpoints" / f"checkpoint-{3 * SAVE_EVERY}" / "model.safetensors")
    small.train(corpus, copy, {})
    assert weights(copy) == weights(uninterrupted)
    assert losses(copy) == losses(uninterrupted)
    assert f"damaged-checkpoint-{3 * SAVE_EVERY}" in (read_status(copy).note or "")


def test_without_a_sound_checkpoint_training_begins_anew(
    corpus: Path, copy: Path, uninterrupted: Path
) -> None:
    for path in (copy / "checkpoints").glob("checkpoint-*/optimizer.safetensors"):
        flip(path)
    small.train(corpus, copy, {})
    assert weights(copy) == weights(uninterrupted)
    assert losses(copy) == losses(uninterrupted)
    assert "training begins anew" in (read_status(copy).note or "")


def test_checkpoints_from_before_there_were_checksums_are_taken_with_a_note(copy: Path) -> None:
    for marker in (copy / "checkpoints").glob(f"checkpoint-*/{MARKER}"):
        marker.write_bytes(b"")
    found, said = newest(copy)
    assert found == f"checkpoint-{3 * SAVE_EVERY}"
    assert "without checksums" in said[0]
    last = copy / "checkpoints" / f"checkpoint-{3 * SAVE_EVERY}"
    (last / "optimizer.safetensors").write_bytes(b"short")
    assert newest(copy)[0] == f"checkpoint-{2 * SAVE_EVERY}"


def test_the_latest_checkpoints_are_kept_whatever_the_clock_says(stopped: Path, copy: Path) -> None:
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (copy / "checkpoints").iterdir())
    assert steps == [2 * SAVE_EVERY, 3 * SAVE_EVERY]
    os.utime(copy / "checkpoints" / f"checkpoint-{3 * SAVE_EVERY}", (0, 0))
    checkpoint.drop_old(copy / "checkpoints", 1)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == [f"checkpoint-{3 * SAVE_EVERY}"]


def test_files_are_on_the_disk_before_a_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and the directories are flushed, and the marker is renamed into place only then."""
    folder = tmp_path / "checkpoint-1"
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(name)
    flushed: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("looks for open files in /proc")
    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.mark_complete(folder)
    assert set(flushed[:-3]) == {"a", "b", "inner", "checkpoint-1"}
    assert flushed[-3].startswith(f".{MARKER}.")
    assert flushed[-2:] == ["checkpoint-1", tmp_path.name]
    assert set(json.loads((folder / MARKER).read_text())) == {"a", "inner/b"}


def test_a_finished_model_has_checksums(uninterrupted: Path, tmp_path: Path) -> None:
    from clearhead.cli.models import load_model

    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    assert not (run / "checkpoints").exists()
    assert load_model(run)[0].training is False
    (run / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BrokenFile, match=r"pytorch_model\.bin .*nothing is unpickled"):
        load_model(run)
    (run / "model" / "pytorch_model.bin").unlink()
    flip(run / "model" / "model.safetensors")
    with pytest.raises(BrokenFile, match=r"model\.safetensors is not what was written"):
        load_model(run)
    # As models were before they had checksums.
    (run / "model" / "checksums.json").unlink()
    load_model(run)
    (run / "model" / "model.safetensors").rename(run / "model" / "pytorch_model.bin")
    with pytest.raises(BrokenFile, match=r"pytorch_model\.bin .*nothing is unpickled"):
        load_model(run)


def test_the_last_step_is_the_budget(uninterrupted: Path) -> None:
    assert losses(uninterrupted)[-1][0] == STEPS


def test_a_loss_that_is_no_number_ends_the_training(
    corpus: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    from clearhead.train.callbacks import TrainingError

    made = TrainingTask(small.recipe(corpus, learning_rate=1e30).for_arm("V1", 0), tmp_path / "run", "V1")
    place(made)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; lower train\.learning_rate"):
        trainer.train_job(made.job, made.directory)
