"""The layers of decoder and encoder: attention, and the blocks around it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clearhead.core.lowering import OneCall, lower, one_call, unlower_streams
from clearhead.core.norm import RMSNorm
from clearhead.models.config import ClearheadConfig
from clearhead.models.shared import Shared
from clearhead.nn import ProjectedAttention

# What "eager" means to a server.
PAGED_EAGER = ALL_ATTENTION_FUNCTIONS["paged|eager"]


class ClearheadAttention(ProjectedAttention):
    """One layer's self-attention: the shared core behind a Hugging Face cache, with a plan made once for all layers.

    For a server it is one call of the server's function, which is handed this module and reads of it layer_idx,
    config, is_causal, scaling, sliding_window and num_key_value_groups, those of the call.
    """

    def __init__(self, config: ClearheadConfig, layer_idx: int) -> None:
        super().__init__(config.make_variant(layer_idx))
        self.config = config
        # Serving stacks tell encoders from decoders by it.
        self.is_causal = config.causal
        self.scaling = self.scale
        self.sliding_window = config.layer_kinds[layer_idx].window
        self.call = one_call(self.variant.sizes)
        self.num_key_value_groups = self.call.groups if isinstance(self.call, OneCall) else 1

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden_size) -> the same, and the effective map (B, H, L, S) if asked.

        kwargs: what a server hands to its attention function; nothing elsewhere.
        """
        here = shared.on(hidden_states.device)
        opened = here.plans is not None and here.plans.takes_logits
        heads = self.project(
            hidden_states, hidden_states, here.rotation, past_key_values, here.table, opened=opened
        )
        if here.plans is not None:
            result = self.combine(heads, here.plans.prepared, output_attentions)
            evict = getattr(past_key_values, "evict", None)
            if evict is not None:
                evict(heads.closed(), here.plans.mask, self.scale, self.variant.mix, self.layer_idx)
            return result
        # vLLM reads this function's source for the one call: of a local name, with `scaling=self.scaling`.
        attend_in_server = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, PAGED_EAGER
        )
        assert here.masks is not None and isinstance(self.call, OneCall)
        lowering = self.call.lowering
        (call,) = lower(heads, lowering, self.layer_idx)
        output, _ = attend_in_server(
            self,
            call.q,
            call.k,
            call.v,
            here.masks.of(self.sliding_window),
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        # (B, L, heads, D) from functions of transformers, (L, heads · D) from those of servers.
        output = output.reshape(*hidden_states.shape[:2], call.q.shape[1], -1).transpose(1, 2)
        streams = unlower_streams([output], lowering, heads.v.shape[1])
        return self.close(self.variant.mix(streams, heads.gate)), None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), no biases (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class ClearheadLayer(GradientCheckpointingLayer):
    """y = x + Attention(RMSNorm(x)); y + SwiGLU(RMSNorm(y))."""

    def __init__(self, config: ClearheadConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.self_attn = ClearheadAttention(config, layer_idx)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden_size) -> the same, and the effective map if asked; kwargs go to the attention."""
        attended, maps = self.self_attn(
            self.input_layernorm(hidden_states), shared, past_key_values, output_attentions, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), maps


class ClearheadDecoderLayer(ClearheadLayer):
    """A layer of the decoder, by a name of its own: tools that wrap or place whole layers are told it."""


class ClearheadEncoderLayer(ClearheadLayer):
    """A layer of the encoder. The first has no norm before its attention: the embedding has one, as in ModernBERT."""

    def __init__(self, config: ClearheadConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx == 0:
            self.input_layernorm = nn.Identity()
