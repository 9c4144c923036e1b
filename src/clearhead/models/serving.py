"""How servers run these models: one call a layer of a function that keeps keys, values and masks itself.

vLLM, SGLang and Hugging Face's continuous batching lay the tokens of many requests side by side in one row, whose
positions restart, and hand what they need for it to the model's forward pass as keyword arguments, which reach their
attention function with each layer's heads. What is decided here: whether a forward pass is such a one, and what of a
model a server cannot be told.

Legend: L queries, S keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clearhead.core.lowering import OneCall, one_call
from clearhead.models.arguments import KNOWN
from clearhead.models.config import ClearheadConfig
from clearhead.models.forward_inputs import Given
from clearhead.models.kinds import FULL, SLIDING, TWIN_KEYS
from clearhead.positions.base import Position
from clearhead.registry import names

CONVERT = "serve what `clearhead convert MODEL --out DIR --to serving` writes"


@dataclass(frozen=True, slots=True)
class Masks:
    """The server's own masks: None, one for all layers (1, 1, L, S), or one a kind of layer by its name."""

    given: Tensor | Mapping[str, Tensor] | None

    def of(self, window: int | None) -> Tensor | None:
        """For a layer with this sliding window."""
        if isinstance(self.given, Mapping):
            return self.given[FULL if window is None else SLIDING]
        return self.given


def is_server(implementation: str | None) -> bool:
    """Whether Hugging Face's interface has a function of this name, and no mask function: it makes its masks itself."""
    if implementation is None or implementation in (*names("engines"), *names("kernels")):
        return False
    return implementation in ALL_ATTENTION_FUNCTIONS and implementation not in ALL_MASK_ATTENTION_FUNCTIONS


def is_served(implementation: str | None, keywords: Mapping[str, Any]) -> bool:
    """Whether this forward pass is a server's: it brings a paged cache, or state for a function of its own."""
    if isinstance(keywords.get("cache"), PagedAttentionCache):
        return True
    return bool(keywords.keys() - KNOWN) and is_server(implementation)


def check_request(
    config: ClearheadConfig, given: Given, output_attentions: bool, reasons: tuple[str | None, ...]
) -> None:
    """ValueError for a model that cannot be served, and for what a server does not hand.

    reasons: `reason_against` for a server with a function of its own, and for one with a paged cache.
    """
    name, paged = config._attn_implementation, isinstance(given.kwargs.get("cache"), PagedAttentionCache)
    if reason := reasons[paged]:
        raise ValueError(reason)
    if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f'a paged cache goes with "sdpa", "paged|eager" or a flash attention, not with attn_implementation {name!r}'
        )
    if given.position_ids is None:
        raise ValueError("a server must give position_ids: each token's place in its own request")
    if isinstance(given.attention_mask, Tensor) and given.attention_mask.ndim != 4:
        raise ValueError(
            f"attention_mask of {given.attention_mask.ndim} dimensions beside a server's keyword arguments: its "
            "attention function would not see the padding"
        )
    for key, value in (("past_key_values", given.cache), ("rope_length", given.rope_length)):
        if value is not None:
            raise ValueError(f"{key} beside a server's keyword arguments, which bring a cache of their own")
    if output_attentions:
        raise ValueError("the attention functions of servers return no maps: leave out output_attentions")


def reason_against(
    config: ClearheadConfig,
    calls: Sequence[OneCall | str],
    positions: Mapping[str, Position],
    paged: bool = False,
) -> str | None:
    """Why no server can run a model whose layers are these calls, in one sentence; None where one can.

    paged: for Hugging Face's paged cache alone, which does not look at the number of query heads.
    """
    if config.block_sparse is not None:
        return "block_sparse cannot be served: the attention functions of servers leave no blocks of keys out"
    return (
        _against_calls(config, calls)
        or _against_positions(positions)
        or _against_names(config, calls, paged)
        or _against_windows(config)
    )


def _against_calls(config: ClearheadConfig, calls: Sequence[OneCall | str]) -> str | None:
    counts = set()
    for kind, call in zip(config.layer_kinds, calls, strict=True):
        if isinstance(call, str):
            return f"attention {kind.attention!r} cannot be served: {call}"
        counts.add((call.query_heads, call.kv_heads))
    if len(counts) > 1:
        return (
            "layers that hand on different numbers of heads cannot be served: a server has one for all layers"
        )
    return None


def _against_positions(positions: Mapping[str, Position]) -> str | None:
    for name, position in positions.items():
        if position.slopes(1) is not None:
            return (
                f"position {name!r} cannot be served: it adds a bias by head to the logits, which the attention "
                "functions of servers do not take"
            )
        if position.depends_on_length:
            return (
                "rope_parameters cannot be served: this rope scaling turns keys by the length of the whole request, "
                "which no server says; scalings that do not look at it (linear, yarn, llama3) can be"
            )
    return None


def _against_names(config: ClearheadConfig, calls: Sequence[OneCall | str], paged: bool) -> str | None:
    call = calls[0]
    assert isinstance(call, OneCall)
    named = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    if named[1:] == (call.kv_heads, call.width) and (paged or named[0] == call.query_heads):
        return None
    return (
        f"attention {config.layer_kinds[0].attention!r} hands a server {call.query_heads} query heads and "
        f"{call.kv_heads} key-value heads, where the configuration names {named[0]} and {named[1]}: {CONVERT}"
    )


def _against_windows(config: ClearheadConfig) -> str | None:
    windows = [kind.window for kind in config.layer_kinds]
    if len({window for window in windows if window is not None}) > 1:
        return "layers with windows of different sizes cannot be served: a server has one size for all"
    told = getattr(config, "layer_types", None)
    if told is None:
        told = [FULL if config.sliding_window is None else SLIDING] * len(windows)
    if [config.sliding_window if name == SLIDING else None for name in told] == windows:
        return None
    return f"a server is not told which layers have a window: {CONVERT}"


def for_servers(config: ClearheadConfig) -> ClearheadConfig:
    """The configuration of the same model that names what a server's attention function is handed.

    ValueError, in one sentence, for a model that no server can run.
    """
    plain = for_people(config)
    kinds = plain.layer_kinds
    calls = [one_call(plain.widths(kind)) for kind in kinds]
    positions = plain.make_positions()
    if reason := _against_calls(plain, calls) or _against_positions(positions):
        raise ValueError(reason)
    call = calls[0]
    assert isinstance(call, OneCall)
    values = plain.to_dict()
    values["twin_heads"] = {key: values[key] for key in TWIN_KEYS}
    values |= dict(zip(TWIN_KEYS, (call.query_heads, call.kv_heads), strict=True))
    windows = {kind.window for kind in kinds if kind.window is not None}
    if len(windows) == 1:
        own = plain.layers or [{}]
        values |= {
            "sliding_window": windows.pop(),
            "layer_types": [FULL if kind.window is None else SLIDING for kind in kinds],
            "layers": [{**own[i % len(own)], "sliding_window": kind.window} for i, kind in enumerate(kinds)],
        }
    made = ClearheadConfig.from_dict(values)
    if reason := reason_against(made, calls, positions):
        raise ValueError(reason)
    return made


def for_people(config: ClearheadConfig) -> ClearheadConfig:
    """The inverse of `for_servers`: head counts are those of the Transformer twin."""
    if config.twin_heads is None:
        return config
    values = config.to_dict() | config.twin_heads | {"twin_heads": None}
    values.pop("layer_types", None)
    return ClearheadConfig.from_dict(values)
