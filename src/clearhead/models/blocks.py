"""The blocks of a decoder layer around its attention."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from clearhead.core.norm import RMSNorm
from clearhead.models.config import ClearheadConfig
from clearhead.models.shared import Shared
from clearhead.nn import ProjectedAttention


class ClearheadAttention(ProjectedAttention):
    """One layer's self-attention: the shared core behind a Hugging Face cache, with a plan made once for all layers."""

    def __init__(self, config: ClearheadConfig, layer_idx: int) -> None:
        super().__init__(config.make_variant(layer_idx))

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden_size) -> the same, and the effective map (B, H, L, S) if asked."""
        here = shared.on(hidden_states.device)
        heads = self.project(hidden_states, hidden_states, here.rotation, past_key_values, here.table)
        result = self.combine(heads, here.plans.prepared, output_attentions)
        evict = getattr(past_key_values, "evict", None)
        if evict is not None:
            evict(heads, here.plans.mask, self.scale, self.variant.mix, self.layer_idx)
        return result


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


class ClearheadDecoderLayer(GradientCheckpointingLayer):
    """y = x + Attention(RMSNorm(x)); y + SwiGLU(RMSNorm(y))."""

    def __init__(self, config: ClearheadConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.self_attn = ClearheadAttention(config, layer_idx)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        shared: Shared,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden_size) -> the same, and the effective map if asked."""
        attended, maps = self.self_attn(
            self.input_layernorm(hidden_states), shared, past_key_values, output_attentions
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), maps
