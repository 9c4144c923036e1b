"""This library's models for servers: the same weights, and a configuration that names what attention functions get."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from clearhead.convert.base import Computation, Source
from clearhead.convert.computing import ModelComputation, WeightReader
from clearhead.convert.own import Clearhead
from clearhead.convert.weights import ConversionError
from clearhead.models.config import ClearheadConfig
from clearhead.models.serving import for_people, for_servers

CONTRACT = "clearhead_contract"
# Written even where they are the defaults of this library: servers may read the file without its class.
READ = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
)


class Serving(Clearhead):
    """`ClearheadForCausalLM` for vLLM, SGLang and continuous batching (`models.serving`)."""

    def claims(self, source: Source) -> bool:
        return super().claims(source) and bool(source.config.get("twin_heads"))

    def configuration(self, source: Source) -> ClearheadConfig:
        return for_people(super().configuration(source))

    def computation(self, config: Mapping[str, Any], weights: Any, dtype: torch.dtype) -> Computation:
        return ServedComputation(ClearheadConfig.from_dict(dict(config)), dtype)

    def written(self, config: ClearheadConfig) -> dict[str, Any]:
        try:
            served = for_servers(config)
        except ValueError as error:
            raise ConversionError(str(error)) from None
        return {**super().written(served), **{key: getattr(served, key) for key in READ}}


@dataclass
class Contract:
    """What one forward pass asks of `answer`: the layers that called it, in order."""

    layers: list[int] = field(default_factory=list)


class ServedComputation(ModelComputation):
    """The model as a server runs it: one row, and one call a layer with the heads that the configuration names.

    ConversionError where the calls are others: the configuration would be wrong.
    """

    def __init__(self, config: ClearheadConfig, dtype: torch.dtype) -> None:
        from clearhead.models.causal import ClearheadForCausalLM

        super().__init__(ClearheadForCausalLM, config, dtype, implementation=CONTRACT)

    def hidden(self, embedded: Tensor, read: WeightReader) -> Tensor:
        contract = Contract()
        self.arguments = {
            "contract": contract,
            "position_ids": torch.arange(embedded.shape[1])[None],
            "return_dict": True,
        }
        states = super().hidden(embedded, read)
        if contract.layers != list(range(len(self.decoder.layers))):
            raise ConversionError(
                f"the layers called their attention function in this order: {contract.layers}"
            )
        return states


def answer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    contract: Contract,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one row (1, H, L, D), written out, to (L, H·D), as servers give it back."""
    config: Any = module.config
    named = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    handed = tuple(x.shape[1] for x in (query, key, value))
    widths = {x.shape[3] for x in (query, key, value)}
    if handed != named or widths != {config.head_dim}:
        raise ConversionError(
            f"layer {module.layer_idx} hands on {handed} heads of queries, keys and values, {widths} wide; the "
            f"configuration names {named}, {config.head_dim} wide"
        )
    contract.layers.append(int(module.layer_idx))  # type: ignore[arg-type]
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    logits = scaling * query @ key.mT
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    if sliding_window is not None:
        hidden |= torch.ones_like(hidden).tril(-sliding_window)
    out = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ value
    return out[0].transpose(0, 1).flatten(1), None


AttentionInterface.register(CONTRACT, answer)
