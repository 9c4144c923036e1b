"""A process that is not the first waits for the run, and says so where that takes long."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clearhead.train import single


def test_who_waits_for_the_first_process_says_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(single, "PATIENCE_SECONDS", 0.0)
    task: Any = SimpleNamespace(directory=tmp_path)
    waiting = threading.Thread(target=single._await, args=(task,))
    waiting.start()
    # It ends by the file alone, and says once what it waits for.
    waiting.join(3 * single.POLL_SECONDS)
    assert waiting.is_alive()
    (tmp_path / "job.json").write_text("{}")
    waiting.join(60)
    assert not waiting.is_alive()
    said = capsys.readouterr().err
    assert said.count(str(tmp_path / "job.json")) == 1 and "share the run's directory" in said
