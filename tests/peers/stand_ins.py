"""What the common tests of transformers import beside themselves and its source distribution does not carry."""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

# What the tests import, all of it.
COMMON = "tests.peers.common"
# The folder that `make test-peers` unpacks, a package of this name.
PACKAGE = "transformers_tests"


class ExportTesterMixin:
    """Export tests are in the repository alone; tests/contracts has its own."""


class GenerationTesterMixin:
    """Generation tests are in the repository alone; tests/contracts has its own."""


def run_distributed(world_size: int) -> Callable[..., Any]:
    """In place of the repository's launcher: `function(rank, *arguments)` in so many processes on this machine.

    They are forked from a server that has imported what they need and computed nothing yet.
    """

    def of(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            import torch.multiprocessing as mp

            mp.get_context("forkserver").set_forkserver_preload([COMMON])
            with tempfile.TemporaryDirectory() as folder:
                work = pickle.dumps((function, arguments))
                mp.start_processes(
                    _as_rank, (world_size, folder, work), world_size, start_method="forkserver"
                )

        return call

    return of


def _as_rank(rank: int, world_size: int, folder: str, work: bytes) -> None:
    import torch
    import torch.distributed as dist

    put_in_place()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    function, arguments = pickle.loads(work)
    function(rank, *arguments)
    dist.destroy_process_group()


# Properties that every configuration must take and give back.
CONFIG_COMMON = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def put_in_place() -> None:
    """Before anything of the package is imported."""
    for path, values in {
        "exporters": {},
        "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
        "generation": {},
        "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        "utils": {},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON},
        "distributed_testing_utils": {"run_distributed": run_distributed},
    }.items():
        module = ModuleType(f"{PACKAGE}.{path}")
        vars(module).update(values)
        sys.modules[module.__name__] = module
