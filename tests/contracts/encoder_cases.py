"""Small encoders of every variant, and the oracle of the same encoder."""

from typing import Any

import torch
from torch import Tensor

from clearhead.models import ClearheadEncoderConfig, ClearheadForMaskedLM
from tests.contracts.model_cases import blocks_of, settings_of, shake, spec_of
from tests.oracles.models import encoder, prediction_head
from tests.oracles.rotary import Turning


def encoder_config(name: str, layout: str = "gqa", **changes: Any) -> ClearheadEncoderConfig:
    return ClearheadEncoderConfig(**settings_of(name, layout) | changes)


def make_encoder(
    name: str, layout: str = "gqa", dtype: torch.dtype = torch.float32, head: Any = None, **changes: Any
) -> Any:
    """With the head for masked tokens, or another."""
    torch.manual_seed(11)
    model = (head or ClearheadForMaskedLM)(encoder_config(name, layout, **changes)).to(dtype).eval()
    shake(model)
    return model


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Leaves in float64 under the model's names, tied ones once."""
    named = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.double() for name, b in model.named_buffers() if name.endswith("progress")}
    return named | buffers


def oracle_states(
    name: str,
    layout: str,
    model: Any,
    weights: dict[str, Tensor],
    ids: Tensor,
    base: float | Turning = 10_000.0,
    **arguments: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states, and effective maps, of an encoder under any head."""
    config = model.config
    own = {
        "embedding": weights["model.embed_tokens.weight"],
        "embedding_norm": weights["model.embed_norm.weight"],
        "final_norm": weights["model.norm.weight"],
    }
    return encoder(
        spec_of(name, layout, weights, base),
        own,
        blocks_of(weights, config.num_hidden_layers),
        ids,
        layer_positions=list(config.positions_by_layer),
        windows=[kind.window for kind in config.layer_kinds],
        **arguments,
    )


def oracle_logits(
    name: str, layout: str, model: Any, weights: dict[str, Tensor], ids: Tensor, **arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    """Of the masked language model: logits (B, L, vocabulary) and effective maps."""
    states, maps = oracle_states(name, layout, model, weights, ids, **arguments)
    x = oracle_head(model, weights, states)
    matrix = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return torch.einsum("bli,oi->blo", x, matrix) + weights["lm_head.bias"], maps


def oracle_head(model: Any, weights: dict[str, Tensor], states: Tensor) -> Tensor:
    """What the heads' last matrix reads."""
    return prediction_head(
        states, weights["head.dense.weight"], weights["head.norm.weight"], model.config.rms_norm_eps
    )
