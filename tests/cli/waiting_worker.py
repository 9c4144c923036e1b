"""The real worker around a training that never ends: it says which process it is and waits to be stopped."""

import os
import threading
from pathlib import Path
from typing import Any

from clearhead.train import worker


def wait(job: Any, job_dir: Path) -> None:
    part = job_dir / "waits.part"
    part.write_text(str(os.getpid()))
    part.replace(job_dir / "waits")
    threading.Event().wait()


if __name__ == "__main__":
    worker.run_job = wait
    raise SystemExit(worker.main())
