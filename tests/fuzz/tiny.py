"""Tiny random models, and the exact logits of a row of tokens that is alone in the world."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from tests.fuzz import exact
from tests.fuzz.draw import Draw
from tests.fuzz.exact import Decoder, Spec
from tests.fuzz.layers import CLASSES, heads_of, options_of, shake
from tests.fuzz.operations import DTYPES, instruction_sets
from tests.fuzz.places import TRAINED, Method, method_for, place_of, request_lengths

VOCABULARY, PAD = 23, 0


@dataclass(frozen=True)
class Tiny:
    """A model of one or two layers; `kinds` names the position of each layer where they differ."""

    seed: int = 0
    attention: str = "softmax"
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 2
    kv_heads: int = 2
    width: int = 4
    hidden: int = 8
    layers: int = 1
    method: Method = field(default_factory=Method)
    kinds: tuple[str, ...] = ()
    compact: bool = False
    tied: bool = False
    dtype: str = "float64"
    implementation: str = "clearhead"
    isa: str | None = None

    @classmethod
    def draw(cls, draw: Draw, exactly: bool = False) -> "Tiny":
        """Any; `exactly` in float64 or float32."""
        attention = draw.among(list(CLASSES))
        collinear = "collinear" in attention
        heads, kv_heads = heads_of(draw, attention)
        width = draw.one(2, 4, 4, 6, 8)
        method, layers = method_for(draw, width, collinear), draw.one(1, 2, 2)
        kinds: tuple[str, ...] = ()
        if not collinear and method.name == "rope" and draw.chance(0.25):
            kinds = tuple(draw.one("rope", "nope", "alibi") for _ in range(layers))
        dtypes = ["float64", "float64", "float32", "float32"] + [] * exactly + ["bfloat16"] * (not exactly)
        return cls(
            seed=draw.seed(),
            attention=attention,
            options=options_of(draw, attention),
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            hidden=draw.one(4, 8, 12),
            layers=layers,
            method=method,
            kinds=kinds,
            compact=collinear and draw.chance(0.4),
            tied=draw.chance(0.2),
            dtype=draw.among(dtypes),
            implementation=draw.one("clearhead", "clearhead", "clearhead", "eager", "sdpa"),
            isa=draw.among(instruction_sets()) if instruction_sets() else None,
        )

    @property
    def positions(self) -> tuple[str, ...]:
        return self.kinds or (self.method.name,) * self.layers

    def make(self, implementation: str | None = None) -> ClearheadForCausalLM:
        """The model, its parameters drawn from the seed."""
        config = ClearheadConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width,
            attention=self.attention,
            attention_options=dict(self.options),
            position=self.method.name,
            layer_positions=list(self.kinds) or None,
            rope_parameters=None if self.method.parameters is None else dict(self.method.parameters),
            max_position_embeddings=TRAINED,
            tie_word_embeddings=self.tied,
            compact_cache=self.compact,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        model = ClearheadForCausalLM(config).double().eval()
        shake(model, self.seed, 0.4)
        model.set_attn_implementation(implementation or self.implementation)
        return model.to(DTYPES[self.dtype])

    def decoder(self, model: ClearheadForCausalLM, gradients: bool = False) -> Decoder:
        """The oracle with this model's parameters, as leaves if gradients are wanted."""
        weights = exact.named(dict(model.named_parameters()))
        for weight in weights.values():
            weight.requires_grad_(gradients)
        specs = [
            Spec(
                self.attention,
                self.heads,
                self.kv_heads,
                self.width,
                index,
                position,
                self.method.layout,
                options=self.options,
                **self.method.xpos,
            )
            for index, position in enumerate(self.positions)
        ]
        head = {} if "lm_head" in weights else {"lm_head": weights["model.embed_tokens"]}
        return Decoder(specs, {**weights, **head})

    def row(
        self,
        decoder: Decoder,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        see: Tensor | None = None,
        bias: Tensor | None = None,
        length: int | None = None,
        embedded: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (L, V) and effective maps (H, L, L) of one row (L,) without padding.

        see: (1, 1 or H, L, L), by default causal within documents. length: of the request, by default the longest
        position + 1 of the row or document.
        """
        L = len(ids)
        place = torch.arange(L) if positions is None else positions
        row = None if documents is None else documents[None]
        if see is None:
            see = exact.visible(L, L, causal=True, documents=row)
        lengths = request_lengths(place[None], row, None) if length is None else torch.full((1, L), length)
        away = (place[None, None, :] - place[None, :, None]).abs().double()
        method = Method("rope", self.method.parameters) if self.kinds else self.method
        made = place_of(method, self.width, place[None], place[None], see, lengths, lengths, bias, away)
        logits, maps = decoder(decoder.embed(ids)[None] if embedded is None else embedded[None], made)
        return logits[0], [m[0] for m in maps]


def tokens(draw: Draw, *shape: int) -> Tensor:
    """Token ids without the special ones."""
    return draw.integers(VOCABULARY, *shape, low=2)
