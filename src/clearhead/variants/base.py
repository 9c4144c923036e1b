"""What a variant is.

Legend: B batch, N tokens, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value
    width.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from clearhead.core.attend import MIXES, Mix, Mixing
from clearhead.core.norm import HeadNorm
from clearhead.core.streams import HeadShape, Streams, Widths, split_heads
from clearhead.positions.base import Rotation
from clearhead.registry import did_you_mean, resolve
from clearhead.variants.placement import CollinearPlacement

# A style of tensor parallelism for what every rank has and uses for its own heads alone: gradients are summed.
SUMMED = "clearhead_summed_gradients"


class Variant(nn.Module, ABC):
    """Turns projections into softmax streams, and the streams' outputs into one.

    It owns its extra parameters only; the layer around it owns q_proj, k_proj, v_proj and o_proj, whose widths
    `widths` names. Weights that are kept elsewhere until they are needed (Accelerate's offloading, FSDP, ZeRO) are
    brought in when a module is called: `gate` is reached by calling the variant, so it may use the variant's own
    parameters; other methods may use those of submodules that they call.
    """

    needs_rotation: ClassVar[bool] = False
    # The variant that it is where nothing is turned; None for one that stays itself.
    without_angles: ClassVar[str | None] = None
    # What a fused kernel may take `mix` for: "single", "difference" or "other". A class that has a `mix` of its own and
    # does not say that it is one of the first two computes something that no kernel knows.
    mixing: ClassVar[Mixing] = "single"
    # Own parameters, by the last part of their name, that stay in float32 in a model of another dtype.
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    # How tensor parallelism shares out the variant's own parameters: one of transformers' styles, or `SUMMED`, for each
    # of them or for the module that holds it ("" is the variant itself). It also says that a projection's rows lie head
    # by head, a key-value head's together, so that equal parts of them are whole heads. None: not shared out.
    tensor_parallel: ClassVar[Mapping[str, str] | None] = None
    # Whether `gate` is the sigmoid of `gate_logit` and nothing else; a class with a `gate` of its own that does not say
    # so has one that no kernel can take.
    sigmoid_gate: ClassVar[bool] = False
    # Whether `diagnostics` says more when it is given the layer's input.
    diagnostics_need_input: ClassVar[bool] = False
    # How the streams are placed where they are collinear, which is what a compact cache rests on.
    placement: CollinearPlacement | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "mix" in vars(cls) and "mixing" not in vars(cls):
            cls.mixing = "other"
        own = vars(cls)
        if "sigmoid_gate" not in own and any(name in own for name in ("gate", "forward", "split")):
            cls.sigmoid_gate = False
        # A `finish` of its own is not what the class above says of its own.
        if "finish" in own and "finishing_norm" not in own:
            cls.finishing_norm = Variant.finishing_norm  # type: ignore[method-assign]

    def __init__(self, shape: HeadShape, sizes: Widths | None = None) -> None:
        """sizes: what `widths` says, where it depends on options."""
        super().__init__()
        self.shape = shape
        self.sizes = self.widths(shape) if sizes is None else sizes
        # Which part of the layer's heads are here, of how many: see `share`.
        self.rank, self.parts = 0, 1
        streams = {"single": 1, "difference": 2}.get(self.mixing, self.sizes.query_streams)
        if self.mixing not in get_args(Mixing) or streams != self.sizes.query_streams:
            raise ValueError(
                f"{type(self).__name__}.mixing is {self.mixing!r} for {self.sizes.query_streams} query streams; it "
                'must be "single" for one, "difference" for two, or "other"'
            )
        if self.mixing == "other" and type(self).mix is Variant.mix:
            raise ValueError(f"{type(self).__name__} has mixing 'other', so it must have a mix of its own")

    @classmethod
    @abstractmethod
    def widths(cls, shape: HeadShape) -> Widths:
        """Projection widths and streams for a twin of this shape; ValueError where the variant has none."""

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """(B, L, widths.q) -> one (B, H, L, D) a stream; by default a single one."""
        return (split_heads(q, self.sizes.heads),)

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        """(B, S, widths.k) -> one (B, G, S, D) a stream, or one that all share; by default a single one."""
        return (split_heads(k, self.sizes.kv_heads),)

    def split(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Streams:
        """Projections, and the layer's input x (B, L, embed_dim), to streams."""
        return Streams(
            self.split_queries(q), self.split_keys(k), split_heads(v, self.sizes.kv_heads), self(x)
        )

    def split_open(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Streams:
        """The same with the gate's logit in place of the gate, where `sigmoid_gate` says that there is one."""
        if not self.sigmoid_gate:
            return self.split(q, k, v, x)
        streams = self.split_queries(q), self.split_keys(k), split_heads(v, self.sizes.kv_heads)
        return Streams(*streams, gate_logit=self(x, True))

    def forward(self, x: Tensor | None, opened: bool = False) -> Tensor | None:
        """`gate`, or if asked `gate_logit`, with the variant's own parameters brought in."""
        return self.gate_logit(x) if opened else self.gate(x)

    def gate(self, x: Tensor | None) -> Tensor | None:
        """What `mix` weighs the second stream with, broadcastable to (B, H, L, 1).

        x is the layer's input, or None where only a gate that does not depend on it is asked for.
        """
        return None

    def gate_logit(self, x: Tensor | None) -> Tensor:
        """What `gate` is the sigmoid of, where `sigmoid_gate` says that it is one."""
        raise NotImplementedError(f"the gate of {type(self).__name__} is no sigmoid")

    def place(self, heads: Streams, rotation: Rotation) -> Streams:
        """Give the streams their positions. The variant decides what is rotated; by default every query and key."""
        return replace(
            heads,
            q=tuple(self.place_query(q, rotation) for q in heads.q),
            k=tuple(self.place_key(k, rotation) for k in heads.k),
        )

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        """One query stream at its positions."""
        return rotation.query(q)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        """One key stream at its positions."""
        return rotation.key(k)

    @property
    def mix(self) -> Mix:
        """How the streams' outputs, (B, H, L, E) each, become one: linear, so that it mixes maps (B, H, L, S) too.

        By default what `mixing` says; a variant with mixing "other" has one of its own.
        """
        return MIXES[self.mixing]

    def finish(self, o: Tensor) -> Tensor:
        """What happens to (B, H, L, E) before the output projection."""
        return o

    def finishing_norm(self) -> HeadNorm | None:
        """`finish` as numbers, for a kernel that norms its output itself; None where `finish` must be called."""
        return None

    def share(self, rank: int, parts: int) -> None:
        """Count from now on as one of the `parts` ranks that share the layer's heads (tensor parallelism).

        Weights are not touched. ValueError where the key-value heads do not divide.
        """
        self.sizes = self.sizes.share(parts)
        self.rank, self.parts = rank, parts

    def reset_parameters(self) -> None:
        """Initialise the variant's own parameters as its paper says."""

    def new_rows(self) -> dict[str, Tensor]:
        """Rows of the projections that the softmax twin does not have, (rows,) bool by the projection's name.

        With the variant's own parameters they are all that a twin's weights do not give it. Empty where the projections
        are the twin's, or have nothing in common with them.
        """
        return {}

    def mean_lambda(self) -> float | None:
        """The mean of the gate where it does not depend on the input, for logs; None where there is none or it does."""
        return None

    def diagnostics(self, x: Tensor | None = None) -> dict[str, float]:
        """Numbers of this layer that are worth a line in a log, by name; λ, where there is one, is "lambda".

        x is the layer's input (B, L, embed_dim), or None where only what does not depend on it is asked for. By default
        the mean of the gate.
        """
        fixed = self.mean_lambda()
        if fixed is not None:
            return {"lambda": fixed}
        gate = None if x is None else self(x)
        return {} if gate is None else {"lambda": float(gate.mean())}

    def flops_per_token(self, mean_keys: float) -> float:
        """Floating-point operations a token beside the layer's projections and its streams' softmax attention.

        mean_keys: keys that a token sees on average. By default two for every weight of the variant's own matrices.
        """
        return 2.0 * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


def make_variant(name: str, shape: HeadShape, options: Mapping[str, Any]) -> Variant:
    """The registered variant `name`; ValueError for a name or an option that is not known, with the nearest one."""
    variant = resolve("variants", name)
    known = option_names(variant)
    for option in options:
        if option not in known:
            raise ValueError(f"attention {name!r} has no option {option!r}: {did_you_mean(option, known)}")
    made: Variant = variant(shape, **options)
    return made


def option_names(variant: type[Variant]) -> list[str]:
    """The keyword arguments that a variant takes beside its shape."""
    return [name for name in inspect.signature(variant).parameters if name != "shape"]
