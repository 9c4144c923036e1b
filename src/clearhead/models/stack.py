"""A stack of layers: what decoder and encoder are made of, and what their layers share in a forward pass.

Legend: B batch, H output heads, L queries, S keys.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from clearhead.core.dispatch import AttentionProblem
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import RMSNorm
from clearhead.core.sparse import BlockSparse
from clearhead.models.arguments import packed_numbers
from clearhead.models.blocks import ClearheadLayer
from clearhead.models.config import AUTOMATIC, ClearheadConfig
from clearhead.models.forward_inputs import (
    Given,
    Placed,
    key_positions,
    place,
    request_lengths,
    shortest_trained_length,
)
from clearhead.models.kinds import Present, held_bits, present
from clearhead.models.parts import check_heads_are_not_shared
from clearhead.models.pretrained import ClearheadPreTrainedModel, backends_for
from clearhead.models.serving import Masks, check_request, is_server, reason_against
from clearhead.models.shared import Plans, Shared
from clearhead.positions.base import Position, Rotation
from clearhead.positions.length import warn_of_unknown_lengths
from clearhead.variants.base import Variant


@dataclass(frozen=True, slots=True)
class Extras:
    """What a forward pass is to give back beside its last states."""

    maps: bool
    states: bool


class ClearheadStack(ClearheadPreTrainedModel):
    """Token embedding, layers and a final norm; a subclass says in its forward pass what it takes and gives.

    layer_class: makes the layer of a number from the configuration.
    """

    layer_class: Callable[[ClearheadConfig, int], ClearheadLayer]

    def __init__(self, config: ClearheadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            type(self).layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # One instance for each distinct method; `layer_positions` says which layer has which.
        self.positions = nn.ModuleDict(config.make_positions())
        self.kinds = config.layer_kinds
        self.look_around()
        self.gradient_checkpointing = False
        calls = [layer.self_attn.call for layer in self.own_layers()]
        # Looked up here: a compiled forward pass has nothing to ask.
        self._reasons = tuple(
            reason_against(config, calls, self.position_methods(), paged) for paged in (False, True)
        )
        if is_server(config._attn_implementation) and self._reasons[False]:
            raise ValueError(self._reasons[False])
        declared = {n for layer in self.own_layers() for n in layer.self_attn.variant.float32_parameters}
        self._keep_in_fp32_modules_strict = [f"self_attn.variant.{name}" for name in sorted(declared)]

    def look_around(self) -> None:
        """Note which layers are here: all of them, or those of one stage of a pipeline."""
        here = [i for i, layer in enumerate(self.layers) if isinstance(layer, ClearheadLayer)]
        # For every layer here the first one of its kind, which stands for the kind in a forward pass.
        first = {kind: layer for layer, kind in reversed([(layer, self.kinds[layer]) for layer in here])}
        self._alike = {layer: first[self.kinds[layer]] for layer in here}
        # A layer that sees every key, whose cache has them all; the one with the widest window where all have one.
        self._widest = max(here, key=lambda layer: self.kinds[layer].window or math.inf, default=0)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L, hidden_size) of what a forward pass was given; ValueError for nothing, and for both."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "torch.jit.trace keeps what it sees of its example (nothing is padded, say) for every input after it; "
                "export with torch.export"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("the input has no tokens")
        return inputs_embeds

    def _asked(self, maps: bool | None, states: bool | None) -> Extras:
        """What to give back: as asked, or as the configuration says."""
        return Extras(
            bool(self.config.output_attentions if maps is None else maps),
            bool(self.config.output_hidden_states if states is None else states),
        )

    def _through(
        self, hidden_states: Tensor, shared: dict[int, Shared], asked: Extras, **handed: Any
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """(B, L, hidden_size) through all layers and the norm; every layer's input, the last output; effective maps."""
        states: tuple[Tensor, ...] = ()
        maps: tuple[Tensor, ...] = ()
        for layer, alike in self._alike.items():
            if asked.states:
                states = (*states, hidden_states)
            found = self.layers[layer](hidden_states, shared[alike], output_attentions=asked.maps, **handed)
            # What stands in for layers of other ranks, in vLLM, gives back what it got.
            hidden_states, layer_map = found if isinstance(found, tuple) else (found, None)
            if layer_map is not None:
                maps = (*maps, layer_map)
        hidden_states = self.norm(hidden_states)
        return (
            hidden_states,
            (*states, hidden_states) if asked.states else None,
            maps if asked.maps else None,
        )

    def _placed(self, inputs_embeds: Tensor, given: Given) -> Placed:
        """Where the tokens of a forward pass stand, and what each may see."""
        batch, queries = inputs_embeds.shape[:2]
        check_heads_are_not_shared()
        return place(
            inputs_embeds,
            given.attention_mask,
            given.position_ids,
            given.cache,
            packed_numbers(given.kwargs, batch, queries),
            distances=any(method.slopes(1) is not None for method in self.position_methods().values()),
            layer=self._widest,
            causal=self.config.causal,
        )

    def _share(
        self, inputs_embeds: Tensor, given: Given, placed: Placed, output_attentions: bool
    ) -> dict[int, Shared]:
        """What the layers of a kind are handed, by the first layer of the kind: made once a pass."""
        methods, (batch, queries) = self.position_methods(), inputs_embeds.shape[:2]
        kinds = {layer: self.kinds[layer] for layer in dict.fromkeys(self._alike.values())}
        slopes = {
            layer: _slopes(methods[kind.position], self._variant(layer), inputs_embeds)
            for layer, kind in kinds.items()
        }
        length = request_lengths(methods.values(), given.rope_length, placed, batch, given.cache)
        if length is not None and not given.told and not self.training:
            warn_of_unknown_lengths(shortest_trained_length(methods.values()), batch, placed.keys)
        compact = self.config.compact_cache and given.cache is not None
        keys = key_positions(placed) if compact else None
        rotations: dict[Any, Rotation] = {}
        plans: dict[Any, Plans] = {}
        shared = {}
        for layer, kind in kinds.items():
            seen = Present(0, placed.keys)
            partial = kind.window is not None or hasattr(given.cache, "kept_padding")
            if partial:
                seen = present(given.cache, queries, layer, placed.keys)
            # Without keys to turn, a window is nothing to a rotation.
            turned = (kind.position, None if keys is None else kind.window)
            if turned not in rotations:
                here = None if keys is None else keys[:, seen.first : seen.first + seen.count]
                rotations[turned] = methods[kind.position](
                    placed.positions, here, length, inputs_embeds.dtype
                )
            # Kinds that differ in what a plan does not ask share theirs: a position without slopes is no part of it.
            own = slopes[layer]
            asked = (kind.attention, str(kind.options), kind.window, None if own is None else kind.position)
            if asked not in plans:
                mask = placed.mask
                if own is not None:
                    mask = replace(mask, slopes=own, offset=placed.past, places=placed.places)
                if partial:
                    mask = seen.of(mask, 0 if placed.past is None else placed.past, kind.window)
                mask = self._with_padding_said(mask)
                bits = held_bits(given.cache, layer)
                variant = self._variant(layer)
                plans[asked] = self._plan(variant, inputs_embeds, mask, seen.count, output_attentions, bits)
            table = self._table(layer, rotations[turned], inputs_embeds) if compact else None
            shared[layer] = Shared(inputs_embeds.device, rotations[turned], plans[asked], table)
        return shared

    def _share_with_server(
        self, inputs_embeds: Tensor, given: Given, output_attentions: bool
    ) -> dict[int, Shared]:
        """The same in a server's forward pass: rotations at the given positions, and the server's masks."""
        check_request(self.config, given, output_attentions, self._reasons)
        assert given.position_ids is not None
        rotations = {
            name: method(given.position_ids, None, None, inputs_embeds.dtype)
            for name, method in self.position_methods().items()
        }
        masks = Masks(given.attention_mask)
        return {
            layer: Shared(
                inputs_embeds.device, rotations[self.kinds[layer].position], plans=None, masks=masks
            )
            for layer in dict.fromkeys(self._alike.values())
        }

    def reason_against_serving(self, paged: bool = True) -> str | None:
        """Why no server can run this model as it stands, in one sentence; None where one can.

        paged: asks for Hugging Face's continuous batching, which does not look at the number of query heads.
        """
        return self._reasons[paged]

    def _table(self, layer: int, rotation: Rotation, inputs_embeds: Tensor) -> Tensor:
        """What turns held keys into keys; in float64 for float64 models."""
        placement = self._variant(layer).placement
        assert placement is not None
        wide = torch.promote_types(torch.float32, inputs_embeds.dtype)
        return placement.table(rotation, inputs_embeds.device, wide)

    def position_methods(self) -> dict[str, Position]:
        """The position methods in use, by name."""
        return {name: cast(Position, method) for name, method in self.positions.items()}

    def _plan(
        self,
        variant: Variant,
        inputs_embeds: Tensor,
        mask: MaskSpec,
        keys: int,
        output_attentions: bool,
        bits: int | None = None,
        source: Tensor | None = None,
    ) -> Plans:
        """For layers of this variant. source: what keys and values are made of, where that is not the layer's input."""
        inputs = [inputs_embeds] if source is None else [inputs_embeds, source]
        sparse = BlockSparse.of(self.config.block_sparse)
        if sparse is not None and sparse.applies(inputs_embeds.shape[1]):
            mask = replace(mask, sparse=sparse)
        problem = AttentionProblem.of_widths(
            variant.sizes,
            queries=inputs_embeds.shape[1],
            keys=keys,
            mask=mask,
            mixing=variant.mixing,
            dtype=self._compute_dtype(inputs_embeds),
            device=inputs_embeds.device,
            needs_grad=torch.is_grad_enabled()
            and any(t.requires_grad for t in chain(inputs, self.parameters())),
            needs_maps=output_attentions,
            held_bits=bits,
        )
        implementation = self.config._attn_implementation or AUTOMATIC
        return Plans.make(problem, mask, backends_for(implementation), implementation == AUTOMATIC)

    def _variant(self, layer: int) -> Variant:
        return cast(ClearheadLayer, self.layers[layer]).self_attn.variant

    def own_layers(self) -> list[ClearheadLayer]:
        """The layers that are here: all of them, or those of one stage of a pipeline."""
        return [layer for layer in self.layers if isinstance(layer, ClearheadLayer)]

    def _with_padding_said(self, mask: MaskSpec) -> MaskSpec:
        """The same as the backend can be told it, where nobody asks for the queries at padded places."""
        implementation = self.config._attn_implementation or AUTOMATIC
        if implementation == AUTOMATIC or mask.key_padding is None or mask.is_causal:
            return mask
        (backend,) = backends_for(implementation)
        return mask.padding_as_documents() if backend.drops_padded_queries else mask

    def _compute_dtype(self, inputs_embeds: Tensor) -> torch.dtype:
        device = inputs_embeds.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return inputs_embeds.dtype


def _slopes(method: Position, variant: Variant, inputs_embeds: Tensor) -> Tensor | None:
    """Those of the heads that are here, on the device of the embeddings; no device is waited for."""
    found = method.slopes(variant.sizes.heads * variant.parts)
    if found is None:
        return None
    own = found if variant.parts == 1 else found.chunk(variant.parts)[variant.rank]
    wide = torch.promote_types(torch.float32, inputs_embeds.dtype)
    return own.to(wide).to(inputs_embeds.device, non_blocking=True)
