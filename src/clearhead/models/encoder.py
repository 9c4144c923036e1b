"""The encoder: token embedding with a norm, layers in which every token sees all others, and a final norm.

Legend: B batch, H output heads, L tokens.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from clearhead.core.norm import RMSNorm
from clearhead.models.arguments import check_keywords
from clearhead.models.blocks import ClearheadEncoderLayer
from clearhead.models.encoder_config import ClearheadEncoderConfig
from clearhead.models.forward_inputs import Given
from clearhead.models.pretrained import ClearheadPreTrainedModel
from clearhead.models.serving import is_served
from clearhead.models.stack import ClearheadStack


class ClearheadEncoderPreTrainedModel(ClearheadPreTrainedModel):
    """Loading, saving and initialisation of encoders."""

    config_class = ClearheadEncoderConfig
    config: ClearheadEncoderConfig


class ClearheadEncoderModel(ClearheadEncoderPreTrainedModel, ClearheadStack):
    """Token embedding, its norm, encoder layers and a final norm.

    The layers are the decoder's: pre-norm, RMSNorm, SwiGLU, separate projections without biases, grouped queries, as in
    LLaMA (arXiv 2302.13971). From ModernBERT (arXiv 2412.13663) comes what is an encoder's: a norm behind the embedding
    and none before the first attention, windows to both sides in some layers, the heads. Not taken from it: GeGLU,
    LayerNorm, another base of RoPE in layers with a window, and dropout inside the layers (on attention maps it has no
    definition under a difference).
    """

    layer_class = ClearheadEncoderLayer

    def __init__(self, config: ClearheadEncoderConfig) -> None:
        super().__init__(config)
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Token ids (B, L) to hidden states (B, L, hidden_size).

        attention_mask: (B, L) with 1 for real tokens and 0 for padding, on either side, or (B, 1 or H, L, L) bool or
            additive, which then says everything, windows too.
        position_ids:   integers (B or 1, L). Without them they count real tokens. Positions that restart among real
            tokens mean packed documents that cannot see each other, as for `ClearheadModel`: texts of mixed length in
            one row need no padding.
        rope_length, output_attentions, kwargs: as for `ClearheadModel`; maps are (B, H, L, L).
        """
        served = is_served(self.config._attn_implementation, kwargs)
        keywords = kwargs if served else check_keywords(kwargs, _ARGUMENTS, causal=False)
        states = self.embed_norm(self._embedded(input_ids, inputs_embeds))
        asked = self._asked(output_attentions, output_hidden_states)
        given = Given(attention_mask, position_ids, rope_length, None, keywords)
        handed: dict[str, Any] = {}
        if served:
            shared = self._share_with_server(states, given, asked.maps)
            handed = {**kwargs, "position_ids": position_ids}
        else:
            shared = self._share(states, given, self._placed(states, given), asked.maps)
        last, all_states, maps = self._through(states, shared, asked, **handed)
        return BaseModelOutput(last_hidden_state=last, hidden_states=all_states, attentions=maps)


_ARGUMENTS = inspect.signature(ClearheadEncoderModel.forward).parameters
