"""The report of a run that still goes on: drawn again when something has changed, and served on this machine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from clearhead.report.build import build_report
from clearhead.runs.directory import LOOK_PAGE
from clearhead.runs.status import read_status

LOOPBACK = "127.0.0.1"
# What a report is made from; what it writes itself is not among it.
_JOBS = ("arms/*/seed-*", "sizes/*/*/seed-*")
_OF_JOBS = ("status.json", "metrics.jsonl", "cost.json", "size.json", "results/*.json", "*/results/*.json")
_SOURCES = ("recipe.toml", "sweep.json", LOOK_PAGE, *(f"{job}/{file}" for job in _JOBS for file in _OF_JOBS))


def watched(run: Path, every: float, say: Callable[[str], None], *, forever: bool = False) -> None:
    """Draw the report of `run` every `every` seconds while its files change, until every job is done or failed.

    forever: also after that, until interrupted. Raises what `build_report` raises for a directory that is no run; a
    file that is just being written is read at the next look.
    """
    drawn = None
    while True:
        ended = _ended(run)
        now = _stamp(run)
        if now != drawn:
            try:
                report = build_report(run, reload_every=None if ended and not forever else every)
            except ValueError as error:
                say(f"not drawn this time: {error}")
            else:
                if drawn is None:
                    say(f"report: {report}, drawn again every {every:g} seconds while the run goes on")
                drawn = now
        if ended and not forever:
            return
        time.sleep(every)


def _stamp(run: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of what the report is made from."""
    found = []
    for pattern in _SOURCES:
        for path in run.glob(pattern):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            found.append((str(path), about.st_mtime_ns, about.st_size))
    return tuple(sorted(found))


def _ended(run: Path) -> bool:
    """Whether every job that has begun is done; False before the first one."""
    jobs = sorted(path.parent for job in _JOBS for path in run.glob(f"{job}/job.json"))
    return bool(jobs) and all(read_status(job).state in ("evaluated", "failed") for job in jobs)


class _Pages(SimpleHTTPRequestHandler):
    """The report, its charts and the page of attention maps, nothing else of the run."""

    def do_GET(self) -> None:
        if self._allowed():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self._allowed():
            super().do_HEAD()

    def _allowed(self) -> bool:
        if self.path == "/":
            self.path = "/report.html"
        asked = Path(self.translate_path(self.path))
        root = Path(self.directory)
        pages = (root / "report.html", root / LOOK_PAGE)
        if asked in pages or (asked.parent == root / "charts" and asked.is_file()):
            return True
        self.send_error(404)
        return False

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for the run."""


@contextmanager
def served(run: Path, port: int) -> Iterator[str]:
    """Serve the report of `run` on the loopback interface while the block runs; gives its address.

    Raises OSError, with a sentence, when the port is taken.
    """
    try:
        server = ThreadingHTTPServer((LOOPBACK, port), partial(_Pages, directory=str(run.absolute())))
    except OSError as error:
        raise OSError(
            f"--port {port} cannot be used ({error.strerror}); give another one, or 0 for a free one"
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
