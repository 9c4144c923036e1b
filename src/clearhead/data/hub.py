"""The Hugging Face hub, asked once whether it is there: where it is not, what the cache holds is used at once.

Its client tries a name that cannot be reached six times, with waits in between, for every file of it.
"""

import os
import socket
import sys
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 4.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def without_waiting() -> None:
    """Before a name of the hub is loaded: take the hub's clients offline, in this process, when it cannot be reached.

    Behind a proxy nothing is tried: only the client knows the way. `HF_HUB_OFFLINE=1` says so without any attempt.
    """
    if any(os.environ.get(name) for name in _PROXIES) or os.environ.get("HF_HUB_OFFLINE"):
        return
    from huggingface_hub import constants

    if not _reachable(constants.ENDPOINT):
        _go_offline()


@lru_cache(maxsize=4)
def _reachable(endpoint: str) -> bool:
    """Whether a connection to the endpoint's port opens within `CONNECT_SECONDS`."""
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _go_offline() -> None:
    """What `HF_HUB_OFFLINE=1` does, for the libraries that have read it already too."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    config: Any = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
