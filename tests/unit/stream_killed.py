"""A process that tokenizes and kills itself: `python -m tests.unit.stream_killed SPEC MOMENT`.

MOMENT is "write:N", in the middle of its Nth file, or "replace:N", when its Nth file is written but not yet in place.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.unit.stream_text import small_shards, spec_in

from clearhead.data.prepare import prepare


def main(folder: str, moment: str) -> None:
    """Prepare the mixture in `folder`, and die."""
    name, _, number = moment.partition(":")
    left = int(number)
    before: Any = {"write": Path.write_bytes, "replace": Path.replace}[name]

    def mortal(path: Path, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if name == "write":
                before(path, arguments[0][: len(arguments[0]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return before(path, *arguments)

    setattr(Path, f"{name}_bytes" if name == "write" else name, mortal)
    small_shards()
    prepare(spec_in(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
