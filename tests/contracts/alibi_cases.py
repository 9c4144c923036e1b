"""Problems with ALiBi under every mask, ways to run them, and their oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import Engine, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.functional import attention, differential_attention
from clearhead.positions.alibi import slopes
from tests.contracts.support import rand
from tests.oracles import alibi, differential, softmax

B, L, S, D = 2, 5, 8, 4
# Six heads: no power of two, so the slopes are no geometric sequence.
LAYOUTS = {"mha": (6, 6), "gqa": (6, 2), "mqa": (6, 1)}
FORMS = ("softmax", "v1", "v2")
SLOPES = slopes(6)


@dataclass(frozen=True)
class Kind:
    """Arguments of the public op, position of the first of L queries (the last ones unless given), and its sizes."""

    op: dict[str, Any] = field(default_factory=dict)
    queries: int = L
    keys: int = S
    offset: int | Tensor | None = None

    @property
    def first(self) -> int:
        return self.keys - self.queries if self.offset is None else int(self.offset)

    def seen(self) -> Tensor:
        """(B, 1, L, S) from the definition of each part."""
        op, out = self.op, torch.ones(B, 1, self.queries, self.keys, dtype=torch.bool)
        for b in range(B):
            for i in range(self.queries):
                for j in range(self.keys):
                    place = self.first + i
                    hidden = bool(op.get("is_causal")) and j > place
                    hidden |= "window" in op and abs(place - j) >= op["window"]
                    hidden |= "key_padding_mask" in op and not op["key_padding_mask"][b, j]
                    hidden |= "documents" in op and bool(op["documents"][b, place] != op["documents"][b, j])
                    out[b, 0, i, j] = not hidden
        if "attn_mask" in op and op["attn_mask"].dtype == torch.bool:
            out = out & op["attn_mask"]
        return out

    def bias(self) -> Tensor:
        """(1, H, L, S)."""
        mask = self.op.get("attn_mask")
        extra = mask if mask is not None and mask.is_floating_point() else 0.0
        return alibi.bias(SLOPES, self.queries, self.keys, self.first) + extra

    def oracle(self, heads: int) -> dict[str, Any]:
        shape = (B, heads, self.queries, self.keys)
        return {"allowed": self.seen().expand(shape), "bias": self.bias().expand(shape)}

    def mask(self) -> MaskSpec:
        names = {"key_padding_mask": "key_padding", "attn_mask": "dense"}
        return MaskSpec(
            offset=self.offset, slopes=SLOPES, **{names.get(name, name): x for name, x in self.op.items()}
        )


LEFT = torch.ones(B, S, dtype=torch.bool)
LEFT[0, :4] = False
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 6, 6]])
HOLES = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(3)) < 0.6
KINDS = {
    "both_ways": Kind(),
    "causal": Kind({"is_causal": True}, queries=S),
    "chunk": Kind({"is_causal": True}),
    "one_token": Kind({"is_causal": True}, queries=1),
    "fixed_cache": Kind({"is_causal": True}, offset=torch.tensor(2)),
    "fixed_cache_one": Kind({"is_causal": True}, queries=1, offset=torch.tensor(4)),
    "fixed_cache_padded": Kind({"is_causal": True, "key_padding_mask": LEFT}, offset=torch.tensor(3)),
    "offset": Kind({"is_causal": True}, offset=1),
    "left_padded": Kind({"is_causal": True, "key_padding_mask": LEFT}, queries=S),
    "left_padded_one": Kind({"is_causal": True, "key_padding_mask": LEFT}, queries=1),
    "right_padded": Kind({"key_padding_mask": LEFT.flip(1)}),
    "packed": Kind({"is_causal": True, "documents": PACKED}, queries=S),
    "packed_both_ways": Kind({"documents": PACKED}, queries=S),
    "window": Kind({"is_causal": True, "window": 3}, queries=S),
    "window_chunk": Kind({"is_causal": True, "window": 4}),
    "window_both_ways": Kind({"window": 2}, queries=S),
    "everything": Kind({"is_causal": True, "window": 4, "documents": PACKED, "key_padding_mask": LEFT}),
}
DENSE = {
    "dense": Kind({"attn_mask": HOLES}, queries=S),
    "bias": Kind({"is_causal": True, "attn_mask": rand(B, 6, L, S, seed=9)}),
}
# What functional ops can say.
SAYABLE = [name for name, kind in (KINDS | DENSE).items() if kind.offset is None]


def inputs_of(form: str, layout: str, kind: Kind, size: float = 1.0) -> tuple[Tensor, ...]:
    """q, k, v, and λ for two streams."""
    heads, groups = LAYOUTS[layout]
    streams, own = 1 if form == "softmax" else 2, 2 if form == "v1" else 1
    q = size * rand(B, streams * heads, kind.queries, D, seed=1)
    k, v = (
        rand(B, own * groups, kind.keys, D, seed=2),
        rand(B, groups, kind.keys, own * D, seed=3),
    )
    return (q, k, v) if form == "softmax" else (q, k, v, rand(B, heads, kind.queries, 1, seed=4))


def heads_of(form: str, inputs: tuple[Tensor, ...]) -> Streams:
    q, k, v = inputs[:3]
    if form == "softmax":
        return Streams((q,), (k,), v)
    keys = (k[:, 0::2], k[:, 1::2]) if form == "v1" else (k,)
    return Streams((q[:, 0::2], q[:, 1::2]), keys, v, inputs[3])


def run(engine: Engine | str, form: str, inputs: tuple[Tensor, ...], mask: MaskSpec) -> Tensor:
    backend = load_backend(engine) if isinstance(engine, str) else engine
    heads, mix = heads_of(form, inputs), single if form == "softmax" else difference
    mask.validate(B, heads.q[0].shape[1], heads.q[0].shape[2], heads.v.shape[2], heads.v.device)
    prepared = prepare((backend,), problem_of(heads, mask, mix.__name__), mask, automatic=False)
    return attend(heads, prepared, D**-0.5, mix)[0]


def oracle_of(form: str) -> Callable[..., Tensor]:
    return softmax.attention if form == "softmax" else differential.differential_attention


def public_op(form: str) -> Callable[..., Tensor]:
    return attention if form == "softmax" else differential_attention
