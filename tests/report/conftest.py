"""One complete run with its report, made once: drawing its charts takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from clearhead.report.build import build_report
from tests.report.example_run import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_run(tmp_path_factory.mktemp("runs") / "demo")
    build_report(root)
    return root
