"""What the common tests of transformers import beside themselves and its source distribution does not carry."""

import sys
from types import ModuleType
from typing import Any
from unittest import SkipTest

# The folder that `make test-peers` unpacks, a package of this name.
PACKAGE = "transformers_tests"


class ExportTesterMixin:
    """Export tests are in the repository alone; tests/contracts has its own."""


class GenerationTesterMixin:
    """Generation tests are in the repository alone; tests/contracts has its own."""


def run_distributed(world_size: int) -> Any:
    """Its launcher is in the repository alone."""

    def skip(*unused: Any) -> Any:
        raise SkipTest("the launcher of several processes is not in the source distribution")

    return skip


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
