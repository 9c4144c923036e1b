"""The hub is asked once whether it is there; where it is not, nobody waits for it."""

import os
import socket
import time

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from clearhead.data import hub
from clearhead.data.corpora import CorpusError, open_corpus
from clearhead.data.tokenizer import load_pretrained


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is thought to be there, at an address where nobody listens; all of it is put back."""
    for name in (*hub._PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # Set and removed once, so that what the code sets goes with the test.
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    hub._reachable.cache_clear()


def test_a_hub_that_is_not_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its client alone would ask six times, with waits of 23 seconds between them, for each file it looks for.
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} seconds"))
    with pytest.raises(CorpusError, match="nobody/nothing"):
        next(iter(open_corpus("hf:nobody/nothing").documents()))
    with pytest.raises(CorpusError, match="nobody/tokenizer"):
        load_pretrained("nobody/tokenizer")
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_there_and_a_proxy_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        hub.without_waiting()
        assert not huggingface_hub.is_offline_mode()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:8080")
    hub.without_waiting()
    assert not huggingface_hub.is_offline_mode()
