"""Two processes on a CPU (gloo) compute what one does: tensor parallelism, a pipeline, FSDP2 by this family's plans."""

from pathlib import Path

from tests.parallel.judging import done, judge, told
from tests.parallel.work import JOBS


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """One test, so that the processes start once: logits, tokens, gradients, saved weights and losses of `JOBS`.

    In the pipeline one stage has windowed layers only: it knows a request's length without the other's cache.
    """
    done(tmp_path, JOBS)
    judge(tmp_path, JOBS)
    # V1 has λ vectors to keep in float32.
    assert "kept" in told(tmp_path, "sharded", "differential")[0]
