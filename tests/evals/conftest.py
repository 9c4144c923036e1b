"""A small prepared corpus of real text, shared by the tests of the evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clearhead.data.packing import DataSpec
from clearhead.data.prepare import PreparedData, prepare
from clearhead.evals.subject import Subject
from tests.evals.fakes import FakeModel

Subjects = Callable[..., Subject]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's own files."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(json.__file__).parent.parent.glob("[a-d]*.py"))[:48]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data(corpus: Path, cache: Path) -> PreparedData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(cache))
        return prepare(DataSpec(source=str(corpus), validation_fraction=0.4, vocab_size=512))


@pytest.fixture
def subject(data: PreparedData) -> Subjects:
    """Makes a subject from a fake model; the untrained level is that of ``untrained``."""

    def make(model: FakeModel, untrained: FakeModel | None = None, training_length: int = 128) -> Subject:
        return Subject(
            model=model,  # type: ignore[arg-type]
            tokenizer=data.tokenizer,
            open_documents=lambda: data.validation,
            device=torch.device("cpu"),
            untrained=lambda: untrained or model,  # type: ignore[arg-type, return-value]
            seed=0,
            training_length=training_length,
        )

    return make
