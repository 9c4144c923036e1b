"""A recipe trained by several processes is the training of one: `[train.parallel]`, other numbers of them, a death."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clearhead.runs.directory import open_run
from clearhead.runs.lock import RunError
from clearhead.runs.recipe import RecipeError
from clearhead.train import single
from clearhead.train.callbacks import TrainingError
from clearhead.train.checkpoint import damage, newest_complete
from clearhead.train.single import train_single
from clearhead.train.spread import rows_of_device
from tests.parallel import ranks, training

JOB = "tests.parallel.training:trained"
FSDP: dict[str, Any] = {"fsdp": True}
BY_ROWS = {"fsdp": True, "rows": 1, "checkpointing": True}
PATIENCE = 300
# torchrun of PyTorch 2.13 hands every attempt the same store, where the addresses of processes that died still stand.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A corpus, and nothing of it kept elsewhere."""
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    training.write_corpus(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


def together(folder: Path, processes: int, *runs: dict[str, Any]) -> None:
    training.plan(folder, list(runs))
    ranks.run(JOB, folder, processes)


def check(folder: Path, *runs: str, loss: float) -> None:
    """Against one process: every step's loss, and the norm of its gradient before it is clipped."""
    for run in runs:
        assert training.apart(folder, run, "one") < loss, run
        assert training.apart(folder, run, "one", "grad_norm") < 1e-5, run
        assert training.probes(folder, run) == pytest.approx(training.probes(folder, "one"), rel=1e-5), run


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(folder / run / "model" / "model.safetensors")


def hop(folder: Path, model: str) -> None:
    """One process; four, two and one that go on from each other; one and two; as many rows as fit, or one at a time."""
    training.train(folder, "one", model)
    training.train(folder, "grows", model, stop=9, parallel=FSDP)
    hops = {"run": "hops", "model": model, "parallel": BY_ROWS}
    together(folder, 4, {"run": "four", "model": model, "parallel": BY_ROWS}, hops | {"stop": 7})
    written = folder / "hops" / "checkpoints" / "checkpoint-4"
    assert damage(written) is None
    files = [path for path in written.rglob("*") if path.is_file() and path.name != "complete"]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    # Each process wrote its own part of the weights.
    assert len(list((written / "weights").iterdir())) == 4
    grows = {"run": "grows", "model": model, "parallel": FSDP}
    together(folder, 2, {"run": "two", "model": model, "parallel": FSDP}, hops | {"stop": 14}, grows)
    training.train(folder, "hops", model, parallel=BY_ROWS)
    assert not (folder / "hops" / "checkpoints").exists()


def judge(folder: Path) -> None:
    check(folder, "four", "two", loss=1e-5)
    check(folder, "hops", "grows", loss=1e-6)
    one = weights(folder, "one")
    for run in ("four", "two", "hops", "grows"):
        found = weights(folder, run)
        assert found.keys() == one.keys()
        for name, value in one.items():
            # Adam divides by the root of what is hardly more than rounding in some weights.
            assert torch.allclose(found[name], value, atol=3e-4), (run, name)
        config = json.loads((folder / run / "model" / "config.json").read_text())
        assert "distributed_config" not in config


def test_other_numbers_of_processes_train_the_same(folder: Path) -> None:
    """A layer each of V1, V2 and CoCA with one embedding for tokens and head, FSDP2, clipped, accumulated."""
    hop(folder, "all")
    judge(folder)


@pytest.mark.long
@pytest.mark.parametrize("model", ["V1", "V2", "CoCA"])
def test_every_variant_trains_the_same(folder: Path, model: str) -> None:
    hop(folder, model)
    judge(folder)


@pytest.mark.long
def test_copies_compiled_layers_and_bfloat16_train_the_same(folder: Path) -> None:
    """The whole model in each process (DDP), compiled layers, and a bfloat16 whose weights, norms and λ are float32."""
    training.train(folder, "one", "V1")
    training.train(folder, "narrow", "V1", precision="bfloat16")
    copies = {"run": "copies", "model": "V1", "parallel": {"rows": 2}}
    compiled = {"run": "compiled", "model": "V1", "parallel": {"fsdp": True, "compile": True}}
    both = {"run": "both", "model": "V1", "precision": "bfloat16", "parallel": FSDP}
    together(folder, 2, copies, compiled, both)
    check(folder, "copies", "compiled", loss=1e-5)
    # Its products round in other places; nothing else of it does.
    assert training.apart(folder, "both", "narrow") < 1e-3
    assert 1e-5 < training.apart(folder, "narrow", "one") < 0.02
    assert {value.dtype for value in weights(folder, "both").values()} == {torch.float32}


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_torchrun_goes_on_after_a_death(folder: Path, seed: str) -> None:
    training.train(folder, "one", "V1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "3", "-m", "tests.parallel.elastic", str(folder), seed],
        capture_output=True,
        text=True,
        env={**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    # An attempt may end while its processes are still meeting.
    began = [int(path.read_text()) for path in sorted(folder.glob("began.*.0"))]
    reached = max(int((folder / f"reached.0.{rank}").read_text()) for rank in range(2))
    assert len(began) == 2 and began[0] == 0 and reached - training.EVERY <= began[1] <= reached
    (folder / "elastic" / "arms" / "arm" / "seed-0").rename(folder / "again")
    check(folder, "again", loss=1e-6)


def test_half_written_and_damaged_checkpoints_are_left(folder: Path) -> None:
    training.train(folder, "run", "V2", stop=9, parallel=FSDP)
    kept = folder / "run" / "checkpoints"
    assert newest_complete(kept, print) == kept / "checkpoint-8"
    (kept / "checkpoint-8" / "complete").unlink()
    assert newest_complete(kept, print) == kept / "checkpoint-4" and not (kept / "checkpoint-8").exists()
    said: list[str] = []
    (kept / "checkpoint-4" / "sharded.json").unlink()
    assert newest_complete(kept, said.append) is None
    assert "sharded.json is missing" in said[0]


def test_a_run_that_has_begun_goes_on_with_other_rows_at_a_time(folder: Path) -> None:
    """A step's rows stay the same, so that only sums are rounded elsewhere; what would not go on is refused by name."""
    training.train(folder, "one", "V1")
    training.train(folder, "changed", "V1", stop=6, parallel={"rows": 1})
    training.train(folder, "changed", "V1", stop=14, parallel={"rows": 4, "checkpointing": True})
    training.train(folder, "changed", "V1")
    check(folder, "changed", loss=1e-6)

    (folder / "run").mkdir()
    open_run(folder / "run", training.recipe(folder, "V1", parallel={"rows": 1}))
    open_run(folder / "run", training.recipe(folder, "V1", parallel={"rows": 2, "checkpointing": True}))
    with pytest.raises(RunError, match=r"different recipe \(train\.parallel\.fsdp: false -> true\)"):
        open_run(folder / "run", training.recipe(folder, "V1", parallel={"rows": 2, "fsdp": True}))


@pytest.mark.parametrize(
    ("parallel", "processes", "expected"),
    [
        ({}, 1, (8, 1)),
        ({}, 4, (2, 1)),
        ({"rows": 1}, 4, (1, 2)),
        ({"rows": 2}, 1, (2, 4)),
        ({}, 3, "8 rows a step, which 3 processes cannot share evenly; make it a multiple of 96"),
        ({"rows": 8}, 2, "train.parallel.rows = 8 does not divide the 4 rows of a step .* a multiple of 512"),
    ],
)
def test_rows_of_a_device(tmp_path: Path, parallel: dict[str, Any], processes: int, expected: Any) -> None:
    job = training.recipe(tmp_path, "V1", parallel=parallel).for_arm("arm", 0)
    if isinstance(expected, str):
        with pytest.raises(TrainingError, match=expected):
            rows_of_device(job, processes)
    else:
        assert rows_of_device(job, processes) == expected


def test_rows_that_no_number_of_processes_can_take_are_refused_by_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"rows = 3 does not divide the 8 rows of a step .* a multiple of 96,"
    ):
        training.recipe(tmp_path, "V1", parallel={"rows": 3})


def test_a_number_of_processes_that_does_not_fit_leaves_no_run_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(TrainingError, match="8 rows a step, which 3 processes cannot share evenly"):
        train_single(
            training.recipe(folder, "V1"), folder / "run", arm="arm", seed=0, fresh=False, say=lambda _: None
        )
    assert not (folder / "run").exists()


def test_the_other_processes_touch_no_run_before_the_first_has_made_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    came: list[str] = []

    def made(_: float) -> None:
        assert not (folder / "run").exists()
        came.append("job.json")
        (folder / "run/arms/arm/seed-0").mkdir(parents=True)
        (folder / "run/arms/arm/seed-0/job.json").touch()

    monkeypatch.setattr(time, "sleep", made)
    monkeypatch.setattr(single, "run_job", lambda *_, **__: came.append("training"))
    train_single(
        training.recipe(folder, "V1"), folder / "run", arm="arm", seed=0, fresh=False, say=lambda _: None
    )
    assert came == ["job.json", "training"]


def test_what_fsdp_does_not_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'parallel\.fsdp trains whole matrices, .* "lora"'):
        training.recipe(tmp_path, "V1", parallel=FSDP, trainable="lora")
    with pytest.raises(RecipeError, match=r"unknown key 'train\.parallel\.fdsp'; did you mean 'fsdp'"):
        training.recipe(tmp_path, "V1", parallel={"fdsp": True})
