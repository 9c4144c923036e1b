"""`clearhead bench`: how fast the attention runs here, beside everything it can be compared with."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clearhead.cli.console import AsJson, interruptible, print_json, say

if TYPE_CHECKING:
    from clearhead.bench.cases import Case

# Seconds between two lines about one case where there is no terminal.
LINE_SECONDS = 30.0
# What sysexits.h calls a temporary failure: call again for the rest.
UNFINISHED = 75


class What(StrEnum):
    """What can be measured."""

    attention = "attention"
    decode = "decode"
    train = "train"
    generate = "generate"


class Device(StrEnum):
    """Where it is measured."""

    cpu = "cpu"
    cuda = "cuda"


def command(
    what: Annotated[
        What,
        typer.Argument(
            help="attention: forward and backward passes, and memory; decode: one query over a long cache; "
            "train: whole training steps; generate: whole models that write, with every cache.",
            show_default=False,
        ),
    ],
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="Only cases whose name matches, such as 'v1-2048-*'; may be given several times. Of generate, those "
            "with short prompts are the default.",
            show_default="all",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="Calls of every peer of a case.")] = 15,
    device: Annotated[
        Device, typer.Option(help="cpu, or cuda for the cases of a GPU of NVIDIA's or AMD's.")
    ] = "cpu",  # type: ignore[assignment]
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="No case begins after so many seconds; exit code 75 where one was left out.",
            show_default="no limit",
        ),
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only cases that OUT has no lines of yet.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Threads of PyTorch.", show_default="its own choice")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON lines to add to.", show_default="runs/bench/WHAT.jsonl, WHAT-cuda.jsonl"),
    ] = None,
    chart: Annotated[
        bool, typer.Option("--chart", help="Also draw the newest lines of OUT, as .png and .svg beside it.")
    ] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Only list the cases.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every way to compute an attention that can run here, interleaved in one process, against its twin.

    Every peer is first checked against float64: where one is wrong the case is not timed, and the exit code is 1.
    Ctrl-C prints what has been measured so far.
    """
    from clearhead.bench.cases import default, select
    from clearhead.bench.gpu_cases import cases_on

    if what is What.generate and device is Device.cuda:
        raise ValueError("bench generate has cases for the CPU alone: leave --device cuda out")
    cases = select(what.value, case or [], cases_on(device.value))
    if list_cases:
        for found in cases:
            print(f"{found.name:42} {found.title}{'' if default(found) else ' (if --case asks for it)'}")
        return
    if not case:
        cases = [found for found in cases if default(found)]
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if device is Device.cuda:
        from clearhead.bench.cuda import reason_against_cuda

        reason = reason_against_cuda()
        if reason is not None:
            raise ValueError(f"--device cuda: {reason}; without it the cases of the CPU are measured")
    name = what.value if device is Device.cpu else f"{what.value}-{device.value}"
    target = out or Path("runs/bench") / f"{name}.jsonl"
    if missing:
        from clearhead.bench.records import named

        there = named(target)
        cases = [found for found in cases if found.name not in there]
    passed, measured = run_cases(what.value, cases, rounds, target, chart, quiet=as_json, seconds=seconds)
    if as_json:
        print_json(measured)
    if not passed:
        raise typer.Exit(1)
    if seconds is not None and not {found.name for found in cases} <= {
        line["case"]["name"] for line in measured
    }:
        raise typer.Exit(UNFINISHED)


def run_cases(
    verb: str,
    cases: "Sequence[Case]",
    rounds: int,
    out: Path,
    chart: bool = False,
    *,
    quiet: bool = False,
    seconds: float | None = None,
) -> tuple[bool, list[dict[str, Any]]]:
    """Measure, print and record `cases`: whether all of them passed their gates, and the records of those that did.

    seconds: after which no case begins any more.
    """
    from clearhead.bench.chart import draw
    from clearhead.bench.machine import facts
    from clearhead.bench.records import append, check_target, lines, read
    from clearhead.bench.run import run_case
    from clearhead.cli.bench_table import render
    from clearhead.cli.tables import results_console
    from clearhead.runs.directory import check_writable

    check_writable(out.parent)
    check_target(out, chart=chart)
    console = results_console(stderr=quiet)
    found = facts(cases[0].device if cases else "cpu")
    console.print(
        ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in found.items()), markup=False
    )
    began = time.monotonic()
    measured: list[dict[str, Any]] = []
    passed = True
    with interruptible(f"interrupted; what was measured to its end is in {out}"):
        for index, case in enumerate(cases):
            if seconds is not None and time.monotonic() - began > seconds:
                say(f"{len(cases) - index} of {len(cases)} cases left out: {seconds:g} seconds are over")
                break
            with _progress() as progress:
                outcome = run_case(case, rounds, progress)
            console.print(render(outcome))
            if outcome.interrupted:
                raise KeyboardInterrupt
            if outcome.red:
                passed = False
                continue
            entries = lines(verb, outcome)
            append(out, entries)
            measured += entries
    if measured:
        say(f"results: {out}")
    if measured and chart:
        say(f"chart: {', '.join(str(path) for path in draw(read(out), out))}")
    return passed, measured


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is going on: a line that changes in a terminal, a line now and then elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
        return
    spoken = float("-inf")

    def speak(text: str) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= LINE_SECONDS:
            say(text)
            spoken = time.monotonic()

    yield speak
