"""What a query may see, said once; every engine turns it into its own form.

Legend: B batch, H query heads, L queries, S keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.core.sparse import BlockSparse


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Visibility of S keys to L queries. The parts combine by "and"; a query that sees no key gets the output zero.

    is_causal:   a query sees keys up to its own position.
    offset:      position of the first query among the keys; by default S − L, so the queries are the LAST L
        positions (decoding, chunked prefill). A scalar tensor for caches of fixed size, whose last keys are not
        written yet.
    window:      a query sees only keys fewer than this many positions away: under is_causal the last `window` keys,
        its own among them; otherwise as many to either side.
    key_padding: (B, S) bool, True where the key is real.
    documents:   (B, S) integers; a query sees keys of its own document only.
    dense:       (L, S) or (B, H, L, S), where a 1 stands for any size: bool, True = visible, or floating point, added
                 to the scaled logits.
    slopes:      (H,) float32 or float64 constants: slope_h · |query position − key position| is taken off the scaled
        logits of head h (ALiBi). Positions are places among the keys, as for `window`, so their distance is the real
        one under padding at either end and within a packed document.
    places:      integers, (B or 1, L) of the queries and (B or 1, S) of the keys: the positions that `slopes` take the
        distance from, where they are not places among the keys.
    sparse:      what a query may lose of what it sees: only a kernel that `leaves_out` takes that. `within` drops it
        from a call that it changes nothing of.
    """

    is_causal: bool = False
    offset: int | Tensor | None = None
    window: int | None = None
    key_padding: Tensor | None = None
    documents: Tensor | None = None
    dense: Tensor | None = None
    slopes: Tensor | None = None
    places: tuple[Tensor, Tensor] | None = None
    sparse: BlockSparse | None = None

    def within(self, queries: int, keys: int) -> "MaskSpec":
        """The same without a window that hides nothing, however large (no position plus it can overflow), and without
        `sparse` where that would leave out nothing."""
        if self.sparse is not None and not self.sparse.applies(queries):
            return replace(self, sparse=None).within(queries, keys)
        if self.window is None or isinstance(self.window, bool) or not isinstance(self.window, int):
            return self
        far = queries + keys + (self.offset if isinstance(self.offset, int) else 0)
        return replace(self, window=None) if self.window >= far else self

    def rows(self, first: int, count: int, queries: int, keys: int) -> "MaskSpec":
        """The same for `count` of the queries from `first` on."""
        dense = self.dense
        if dense is not None and dense.shape[-2] > 1:
            dense = dense[..., first : first + count, :]
        places = None if self.places is None else (self.places[0][:, first : first + count], self.places[1])
        offset = (keys - queries if self.offset is None else self.offset) + first
        return replace(self, offset=offset, dense=dense, places=places)

    def columns(self, first: int, count: int, queries: int, keys: int) -> "MaskSpec":
        """The same for `count` of the keys from `first` on; not with documents, which queries have by their own key."""
        assert self.documents is None
        part = slice(first, first + count)
        dense = self.dense
        if dense is not None and dense.shape[-1] > 1:
            dense = dense[..., part]
        padding = None if self.key_padding is None else self.key_padding[:, part]
        places = None if self.places is None else (self.places[0], self.places[1][:, part])
        offset = (keys - queries if self.offset is None else self.offset) - first
        return replace(self, offset=offset, key_padding=padding, dense=dense, places=places)

    def padding_as_documents(self) -> "MaskSpec":
        """The same to the queries at real places, said by documents alone; queries are the keys' own tokens.

        Padding is documents apart, before and behind the real tokens. What its own queries see is another thing then.
        """
        assert self.key_padding is not None
        numbers = self.key_padding.long() if self.documents is None else self.documents
        begun = self.key_padding.cumsum(dim=1) > 0
        apart = torch.where(begun, -2, -1)
        return replace(self, key_padding=None, documents=torch.where(self.key_padding, numbers, apart))

    @property
    def is_of_nothing(self) -> bool:
        """Whether a part says that the batch is empty."""
        return any(part is not None and part.shape[0] == 0 for part in (self.key_padding, self.documents))

    @property
    def features(self) -> frozenset[str]:
        """Names of the parts in use, for the choice of an engine."""
        parts = {
            "causal": self.is_causal,
            "window": self.window is not None,
            "padding": self.key_padding is not None,
            "documents": self.documents is not None,
            "dense": self.dense is not None and not self.dense.is_floating_point(),
            "bias": self.dense is not None and self.dense.is_floating_point(),
            "alibi": self.slopes is not None,
            "places": self.places is not None,
            "block_sparse": self.sparse is not None,
        }
        return frozenset(name for name, used in parts.items() if used)

    @property
    def differs_by_head(self) -> bool:
        """Whether a part says something else for each head."""
        return self.slopes is not None or (
            self.dense is not None and self.dense.ndim == 4 and self.dense.shape[1] > 1
        )

    def query_positions(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(L,) positions of the queries among the keys."""
        offset = keys - queries if self.offset is None else self.offset
        return torch.arange(queries, device=device) + offset

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether this is the square lower triangle and nothing else, which fused kernels know by a flag."""
        return self.features == {"causal"} and queries == keys and self.ends_aligned(queries, keys)

    def is_open(self, queries: int, keys: int) -> bool:
        """Whether every query sees every key without looking at tensor values (a single decoded token, for one)."""
        if self.features - {"causal"}:
            return False
        return not self.is_causal or (queries == 1 and self.ends_aligned(queries, keys))

    def ends_aligned(self, queries: int, keys: int) -> bool:
        """Whether the last query is known to be the last key, as in everything but caches of fixed size."""
        # A tensor's value is not looked at: it would stall a GPU and break a compiled graph.
        return self.offset is None or (isinstance(self.offset, int) and self.offset == keys - queries)

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(B or 1, H or 1, L, S) bool of the boolean parts."""
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        positions = self.query_positions(queries, keys, device)
        if self.is_causal:
            allowed = allowed & (torch.arange(keys, device=device) <= positions[:, None])
        if self.window is not None:
            distance = torch.arange(keys, device=device) - positions[:, None]
            allowed = allowed & (distance.abs() < self.window)
        if self.key_padding is not None:
            allowed = allowed & self.key_padding[:, None, None, :]
        if self.documents is not None:
            own = self.documents.index_select(1, positions)
            allowed = allowed & (own[:, None, :, None] == self.documents[:, None, None, :])
        if self.dense is not None and not self.dense.is_floating_point():
            allowed = allowed & _as_four(self.dense)
        return allowed

    def materialise(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(B or 1, H or 1, L, S): bool, or additive in `dtype` when slopes or a floating-point part are present."""
        allowed = self.visible(queries, keys, device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bias = self._bias(queries, keys, wide, device)
        if bias is None:
            return allowed
        bias = bias.masked_fill(~allowed, float("-inf"))
        return bias.to(dtype) if self.dense is None else _cast(_lifted(bias), dtype)

    def parts(
        self, queries: int, keys: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """What is visible, (B or 1, H or 1, L, S) bool, and what is added to the logits, or None: both as they are.

        `materialise` may add another number to all of a row, which only softmax over the whole row does not notice.
        """
        return self.visible(queries, keys, device), self._bias(queries, keys, dtype, device)

    def diagonals(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(H, L + S − 1) additive in `dtype`, [h, j − i + L − 1] for key j and query i: all of a mask with slopes.

        None where a key's distance from the query does not decide everything.
        """
        if self.slopes is None or self.features - {"causal", "window", "alibi"}:
            return None
        first = self.query_positions(1, 1 + keys - queries, device)
        away = torch.arange(queries + keys - 1, device=device) - (queries - 1) - first
        hidden = torch.zeros_like(away, dtype=torch.bool)
        if self.is_causal:
            hidden = hidden | (away > 0)
        if self.window is not None:
            hidden = hidden | (away.abs() >= self.window)
        bias = -self.slopes.to(dtype).to(device, non_blocking=True)[:, None] * away.abs().to(dtype)
        return bias.masked_fill(hidden, float("-inf"))

    def _bias(self, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(B or 1, H or 1, L, S): what is added to the logits, or None."""
        dense = self.dense if self.dense is not None and self.dense.is_floating_point() else None
        if self.slopes is None:
            return None if dense is None else _cast(_as_four(dense), dtype)
        if self.places is None:
            positions = self.query_positions(queries, keys, device)
            distance = (torch.arange(keys, device=device) - positions[:, None])[None, None]
        else:
            own, theirs = self.places
            distance = theirs[:, None, None, :] - own[:, None, :, None]
        bias = -self.slopes.to(dtype).to(device, non_blocking=True)[:, None, None] * distance.abs().to(dtype)
        return bias if dense is None else bias + _cast(_as_four(dense), dtype)

    def validate(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device | None = None
    ) -> None:
        """Raise ValueError, naming the argument, if a part does not fit the problem or lies on another device.

        None asks nothing of devices.
        """
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"is_causal must be True or False, not {self.is_causal!r}")
        parts = (
            ("key_padding_mask", self.key_padding),
            ("documents", self.documents),
            ("attn_mask", self.dense),
            ("alibi_slopes", self.slopes),
        )
        for name, part in parts:
            if part is None:
                continue
            if not isinstance(part, Tensor):
                raise ValueError(f"{name} must be a tensor, not {type(part).__name__}")
            # Slopes are a few constants that are copied to where they are needed; from meta nothing can be copied.
            if device is not None and part.device != device and (name != "alibi_slopes" or part.is_meta):
                raise ValueError(f"{name} is on {part.device}, q on {device}; they must agree")
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int)):
            raise ValueError(f"window must be an integer, not {self.window!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}: a query sees its own position")
        placed = {
            "is_causal": self.is_causal,
            "window": self.window is not None,
            "documents": self.documents is not None,
            "alibi_slopes": self.slopes is not None,
        }
        if any(placed.values()) and self.offset is None and queries > keys:
            name = next(name for name, used in placed.items() if used)
            raise ValueError(
                f"{name} with {queries} queries and {keys} keys: there must be at least as many keys as queries"
            )
        for name, part in (("key_padding_mask", self.key_padding), ("documents", self.documents)):
            if part is not None and (
                part.ndim != 2 or part.shape[1] != keys or part.shape[0] not in (1, batch)
            ):
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}; expected (batch {batch}, keys {keys})"
                )
        if self.key_padding is not None and self.key_padding.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be bool (True = visible), not {self.key_padding.dtype}")
        if self.documents is not None and not _holds_integers(self.documents):
            raise ValueError(f"documents must hold integers, not {self.documents.dtype}")
        if self.dense is not None:
            _check_dense(self.dense, (batch, heads, queries, keys))
        if self.slopes is not None:
            _check_slopes(self.slopes, heads)


def _holds_integers(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check_dense(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    # Three dimensions could be one mask a head or one a sequence, and nothing would tell which was meant.
    if mask.ndim not in (2, 4) or any(
        size not in (1, full) for size, full in zip(mask.shape, shape[-mask.ndim :], strict=True)
    ):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; expected {shape[2:]} or {shape}, where 1 stands for any size"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attn_mask must be bool (True = visible) or floating point (added), not {mask.dtype}"
        )


def _check_slopes(slopes: Tensor, heads: int) -> None:
    if slopes.shape != (heads,):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}; expected ({heads},), one for each output head"
        )
    if slopes.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"alibi_slopes must be float32, or float64, whatever the dtype of q, not {slopes.dtype}"
        )
    if slopes.requires_grad:
        raise ValueError("alibi_slopes are constants and get no gradient: give them detached")


def _as_four(mask: Tensor) -> Tensor:
    return mask[None, None] if mask.ndim == 2 else mask


def _cast(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`bias` in `dtype`. A large number stays one: as an infinity it would hide a key, or a whole row."""
    limit = torch.finfo(dtype).max
    if torch.finfo(bias.dtype).max <= limit:
        return bias.to(dtype)
    return torch.where(bias.isfinite(), bias.clamp(-limit, limit), bias).to(dtype)


def _lifted(bias: Tensor) -> Tensor:
    """`bias` with zero for the largest number of each row, which softmax does not notice.

    Beside −1e9 for every key logits round to one another, and a fused kernel's log of the row's sum, which its gradient
    rests on, to nothing.
    """
    top = bias.detach().amax(dim=-1, keepdim=True)
    return bias - torch.where(top.isfinite(), top, 0.0)


def snapshot_length(length: int | Tensor) -> int | Tensor:
    """The length of a cache as it is now: those of fixed size give a tensor that their next update changes in place."""
    return length.clone() if isinstance(length, Tensor) else length


def packed_documents(position_ids: Tensor) -> Tensor:
    """(B, L) document numbers from positions: a new one begins wherever a position does not follow its neighbour.

    The convention of Hugging Face for packed sequences.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts.cumsum(dim=1)
