"""One process of a training that torchrun starts again: `-m tests.parallel.elastic FOLDER SEED`.

In the first attempt one process dies, at a moment drawn from the seed.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clearhead.train import trainer
from clearhead.train.callbacks import SaveAt
from clearhead.train.single import train_single
from tests.parallel import training

LATEST = 0.02  # seconds after a step began


def main(folder: Path, seed: str) -> None:
    attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    draw = random.Random(seed)
    victim, step = draw.randrange(2), draw.randrange(training.EVERY + 1, training.STEPS)
    delay = draw.uniform(0, LATEST)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(SaveAt):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (folder / f"began.{attempt}.{rank}").write_text(str(state.global_step))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (folder / f"reached.{attempt}.{rank}").write_text(str(state.global_step))
            if (attempt, rank, state.global_step) == (0, victim, step):
                threading.Timer(delay, die).start()

    torch.set_num_threads(1)
    made = training.recipe(folder, "V1", parallel={"fsdp": True})
    with patch.object(trainer, "SaveAt", Dying):
        train_single(made, folder / "elastic", arm="arm", seed=0, fresh=False, say=print)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
