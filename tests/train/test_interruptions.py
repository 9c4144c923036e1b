"""What a full disk, a signal or a kill leaves: a sentence that names the file, and nothing that stays behind."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tests.train import small
from transformers import TrainerControl, TrainerState, TrainingArguments

from clearhead.analysis.sections import LineChart
from clearhead.cli import main
from clearhead.cli.console import AGAIN_SECONDS, Interrupted, interruptible
from clearhead.data.cache import write_atomic
from clearhead.data.writing import Unwritten, writing
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.report import charts
from clearhead.runs.directory import check_writable, set_aside
from clearhead.runs.files import write_text
from clearhead.runs.lock import RunError
from clearhead.runs.status import Status, read_status, write_status
from clearhead.train import sharded, trainer, worker
from clearhead.train.callbacks import Journal, StatusCallback
from clearhead.train.pool import TrainingTask


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes, as the kernel sees to for writers in every language."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _in_rust(path: Path) -> None:
    with writing(path):
        save_file({"a": torch.zeros(1000)}, path)


def _sample(path: Path) -> None:
    with SampleLog(path, ("index",), {}) as log:
        log.add({"index": 0, "text": "x" * 1000})


WRITERS: dict[str, Callable[[Path], object]] = {
    "status.json": lambda path: write_text(path, "x" * 1000),
    "metrics.jsonl": lambda path: Journal(path, 0).write({"step": 1, "text": "x" * 1000}),
    "model.safetensors": _in_rust,
    "multi_needle.partial.jsonl": _sample,
    "tokenizer.json": lambda path: write_atomic(path, b"x" * 1000),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("room", [0, 60])
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path, name: str, room: int) -> None:
    with full_disk(room), pytest.raises(Unwritten) as told:
        WRITERS[name](tmp_path / name)
    assert str(told.value) == (
        f"{tmp_path / name} cannot be written (File too large); make room and give the same command again"
    )


def test_a_full_disk_is_told_of_a_shared_checkpoint_too(tmp_path: Path) -> None:
    """PyTorch's error of a distributed checkpoint is no Exception, so that nobody would catch it."""
    config = ClearheadConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    model = ClearheadForCausalLM(config)
    with full_disk(60), pytest.raises(Unwritten, match=r"\(File too large\); make room"), writing(tmp_path):
        sharded.save_weights(tmp_path / "checkpoint-1", model)
    sharded.save_weights(tmp_path / "checkpoint-2", model)
    next((tmp_path / "checkpoint-2" / "weights").iterdir()).unlink()
    with pytest.raises(Exception, match=r"weights|metadata|[Mm]issing"):
        sharded.load_weights(tmp_path / "checkpoint-2", model)


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "nothing").read_text()
    with pytest.raises(RuntimeError, match="no disk"), writing(tmp_path):
        raise RuntimeError("no disk")


def test_a_worker_ends_in_order_when_the_disk_takes_not_even_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_dir = small.task(tmp_path / "corpus", tmp_path / "job").directory
    handled = []

    def run_job(job: object, job_dir: Path) -> None:
        handled.append(signal.getsignal(signal.SIGINT))
        raise Unwritten(28, "No space left on device", str(job_dir / "metrics.jsonl"))

    monkeypatch.setattr(worker, "run_job", run_job)
    monkeypatch.setattr(worker, "_end_with", lambda parent: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(job_dir), "--threads", "1", "--parent", "1"])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert worker.main() == 1
        assert "metrics.jsonl cannot be written (No space left" in (read_status(job_dir).error or "")
        with monkeypatch.context() as patch:
            patch.setattr(worker, "write_status", lambda *_: write_text(tmp_path, ""))
            assert worker.main() == 1
    finally:
        signal.signal(signal.SIGINT, before)
    # Ctrl-C ends a worker as any other signal does, without a traceback in its log.
    assert handled == [signal.SIG_DFL] * 2


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """A shell starts background jobs without Ctrl-C, nohup without a hangup, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_interruption(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted, match="the reason"), interruptible("the reason"):
        os.kill(os.getpid(), number)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible("the reason"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_finaliser_is_not_lost(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match="the reason"), interruptible("the reason"):
        Finalised()
        time.sleep(30)
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_in_a_finaliser_at_the_end_of_a_block_inside_another_is_not_lost() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with (
        pytest.raises(Interrupted, match="the inner"),
        interruptible("the outer"),
    ):
        with interruptible("the inner"):
            Finalised()
        time.sleep(10 * AGAIN_SECONDS)


def test_an_interruption_outside_of_a_run_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", app)
    monkeypatch.setattr(sys, "argv", ["clearhead"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_checkpoints_that_a_killed_process_did_not_come_to_remove_go_with_the_next_call(
    tmp_path: Path,
) -> None:
    made: TrainingTask = small.task(tmp_path / "corpus", tmp_path / "job")
    (made.directory / "model").mkdir()
    (made.directory / "model" / "config.json").touch()
    (made.directory / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    trainer.train_job(made.job, made.directory)
    assert not (made.directory / "checkpoints").exists()


def test_a_run_that_goes_on_from_its_last_step_keeps_its_loss(tmp_path: Path) -> None:
    """Killed between its last checkpoint and its model: no step is left that would tell the loss again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "loss": 5.5}\n{"step": 6, "loss": 5.25}\n{"step": 6, "probe": {}}\n')
    write_status(tmp_path, Status("training", step=6, loss=5.5))
    journal = Journal(path, 6)
    state = TrainerState(global_step=6, is_world_process_zero=True)
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])
    StatusCallback(tmp_path, 128, 6, journal.loss).on_train_begin(arguments, state, TrainerControl())
    assert read_status(tmp_path).loss == 5.25


def test_what_a_killed_process_left_half_written_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".probe").write_text("half")
    (tmp_path / ".bpe.json.part").write_text("half")
    check_writable(tmp_path)
    write_atomic(tmp_path / "bpe.json", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["bpe.json"]


def test_a_chart_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "draw", lambda chart, arms: Figure(figsize=(0.1, 0.1), dpi=10))
    with full_disk(60), pytest.raises(Unwritten, match=r"lines\.pdf cannot be written"):
        charts.render(LineChart("lines", "", "", "", []), {}, tmp_path)


def test_fresh_leaves_a_directory_that_is_no_run_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"thesis' is not a run directory .*--fresh leaves it alone.*--out"):
        set_aside(tmp_path / "thesis", print)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]
