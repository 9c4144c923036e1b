"""What vLLM loads at its start, by the entry point `vllm.general_plugins`: it makes this library's models known there.

Nothing is imported until vLLM calls `register`. Without vLLM this module is an error: there is nothing to be known to.
"""

import importlib.util

if importlib.util.find_spec("vllm") is None:
    raise ImportError(
        "clearhead.vllm_plugin is for vLLM, which is not installed: pip install vllm, and vLLM will load it by itself"
    )


def register() -> None:
    """Make `ClearheadForCausalLM` and its configuration known to transformers, where vLLM looks them up.

    vLLM calls it in each of its processes, any number of times. Its Transformers backend does the rest.
    """
    import clearhead.models  # noqa: F401
