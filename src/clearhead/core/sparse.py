"""Attention that may leave out blocks of keys: how much of each query's softmax it may lose, and who judges that."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from clearhead.core.streams import check_whole

ESTIMATES = ("bound", "moments")


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """What a query may lose where it attends to blocks of keys, 64 queries and 128 keys at a time.

    left_out: the largest share of its softmax mass, in each stream: 0 (nothing, the same computation as without this)
        up to, not including, 1.
    estimate: "bound" leaves a block out where it is certain that no query loses more. An output then is at most

            |Δo_c| ≤ left_out · (1 + |λ|) · (max_j v_jc − min_j v_jc)

        off in channel c, beside rounding (without a second stream λ is 0). "moments" goes by each block's mean key and
        its variance by channel, as if keys were spread normally: mostly near `left_out`, and no bound for any query.
    least:    calls of fewer queries (decoding, short prompts) leave out nothing.
    Raises ValueError, naming the field, for what does not fit.
    """

    left_out: float
    estimate: Literal["bound", "moments"] = "bound"
    least: int = 1024

    def __post_init__(self) -> None:
        share = self.left_out
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise ValueError(
                f"block_sparse: left_out must be a share of at least 0 and below 1, not {share!r}"
            )
        if self.estimate not in ESTIMATES:
            raise ValueError(
                f"block_sparse: estimate must be {' or '.join(map(repr, ESTIMATES))}, not {self.estimate!r}"
            )
        check_whole("block_sparse: least", self.least)

    @classmethod
    def of(cls, given: "BlockSparse | Mapping[str, Any] | None") -> "BlockSparse | None":
        """What a user gave: such a value, a mapping of its fields, or None; ValueError for anything else."""
        if given is None or isinstance(given, cls):
            return given
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(f"block_sparse must be a mapping with {', '.join(known)}, not {given!r}")
        for name in given:
            if name not in known:
                raise ValueError(f"block_sparse has no key {name!r}; it has {', '.join(known)}")
        if "left_out" not in given:
            raise ValueError("block_sparse must say left_out, the share of softmax mass that may be lost")
        return cls(**given)

    def applies(self, queries: int) -> bool:
        """Whether it changes anything for a call of `queries` queries."""
        return queries >= self.least and self.left_out > 0
