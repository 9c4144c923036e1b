"""Any attention function registered in Hugging Face's AttentionInterface, FlashAttention among them."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clearhead.core.dispatch import AttentionProblem, Backend, Caps, Engine, register_factory
from clearhead.core.lowering import Lowering, SoftmaxCall
from clearhead.core.masks import MaskSpec

_INDEXED = frozenset({"causal", "window", "padding", "documents"})
_FLASH = Caps(
    wide_values="split",
    masks=_INDEXED,
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    devices=frozenset({"cuda", "xpu", "npu"}),
    max_width=256,
)
KNOWN_CAPS = {
    "flash_attention_2": _FLASH,
    "flash_attention_3": _FLASH,
}
# An unknown function gets what every one of them must manage: values as wide as keys, masks that its own mask
# function can say.
CAUTIOUS = Caps(wide_values="split", masks=_INDEXED)


@dataclass(frozen=True, slots=True)
class HfMask:
    """A mask in the form of one attention function, with what it wants beside it.

    window: the sliding window, None for none.
    bounds, longest: where the documents of the flattened batch of `rows` rows begin and end, and the longest of them.
    """

    attention_mask: Any
    is_causal: bool
    window: int | None = None
    rows: int = 1
    bounds: Tensor | None = None
    longest: int = 0


class _Site(nn.Module):
    """What Hugging Face's attention functions read off the module that calls them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.is_causal = True
        self.layer_idx = 0
        self.num_key_value_groups = 1
        self.scaling = 1.0
        self.sliding_window: int | None = None
        self.config = SimpleNamespace(_attn_implementation=name)


class HuggingFace(Engine):
    """The function registered under `name`, with the mask function registered under the same name.

    A name without a mask function is refused: Hugging Face would silently drop padding. Such functions are those of
    servers, which bring keys, values and masks of their own; models call them otherwise (`models.serving`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._site = _Site(name)

    def caps(self, device: str) -> Caps:
        caps = KNOWN_CAPS.get(self.name, CAUTIOUS)
        if device == "npu":
            # Hugging Face's flash functions for it have no window argument and would silently see everything.
            caps = replace(caps, masks=caps.masks - {"window"})
        return caps

    def refusal(self, problem: AttentionProblem) -> str | None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if self.name not in ALL_MASK_ATTENTION_FUNCTIONS:
            return (
                "Hugging Face's AttentionMaskInterface has no mask function for it, so padding would be lost"
            )
        return super().refusal(problem) or (_unsayable(problem) if self._flash_like() else None)

    @property
    def drops_padded_queries(self) -> bool:
        return self._flash_like()

    def _flash_like(self) -> bool:
        # Such a function never sees a mask of queries against keys: only lengths of sequences, or (B, S) padding.
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

        return ALL_MASK_ATTENTION_FUNCTIONS.get(self.name) is flash_attention_mask

    def prepare(self, mask: MaskSpec, problem: AttentionProblem, lowering: Lowering) -> HfMask:
        from transformers.masking_utils import (
            ALL_MASK_ATTENTION_FUNCTIONS,
            and_masks,
            bidirectional_mask_function,
            causal_mask_function,
            packed_sequence_mask_function,
            sliding_window_bidirectional_overlay,
        )

        rule = causal_mask_function if mask.is_causal else bidirectional_mask_function
        if mask.window is not None:
            # Theirs counts the farthest key still seen, ours the first one that is not.
            rule = and_masks(rule, sliding_window_bidirectional_overlay(mask.window - 1))
        if mask.documents is not None:
            rule = and_masks(rule, packed_sequence_mask_function(mask.documents))
        batches = [part.shape[0] for part in (mask.key_padding, mask.documents) if part is not None]
        native = ALL_MASK_ATTENTION_FUNCTIONS[self.name](
            batch_size=max(batches) if batches else 1,
            q_length=problem.queries,
            kv_length=problem.keys,
            q_offset=problem.keys - problem.queries if mask.offset is None else mask.offset,
            kv_offset=0,
            mask_function=rule,
            attention_mask=mask.key_padding,
            allow_is_causal_skip=mask.features == {"causal"},
            dtype=problem.dtype,
            config=self._site.config,
            use_vmap=False,
            device=torch.device(problem.device),
        )
        if mask.documents is None or not self._flash_like():
            return HfMask(native, mask.is_causal, mask.window)
        rows = mask.documents.shape[0]
        return HfMask(native, mask.is_causal, mask.window, rows, *_document_bounds(mask.documents))

    def __call__(self, call: SoftmaxCall, mask: HfMask, scale: float) -> tuple[Tensor, Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        site = self._site
        site.num_key_value_groups = call.q.shape[1] // call.k.shape[1]
        site.is_causal, site.sliding_window = mask.is_causal, mask.window
        site.layer_idx, site.scaling = call.layer_idx, scale
        batch, native = call.q.shape[0], mask.attention_mask
        extra: dict[str, Tensor | int] = {}
        if isinstance(native, Tensor) and native.ndim == 2:
            native = native.expand(batch, -1)
        if mask.bounds is not None:
            # Positions that restart, Hugging Face's other way to say it, would be ignored for more than one row.
            bounds = _tiled(mask.bounds, batch // mask.rows)
            extra = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            extra |= {"max_length_q": mask.longest, "max_length_k": mask.longest}
        out, _ = ALL_ATTENTION_FUNCTIONS[self.name](
            site,
            call.q,
            call.k,
            call.v,
            native,
            dropout=0.0,
            scaling=scale,
            is_causal=mask.is_causal,
            # For functions that see no mask of queries against keys; to either side unless causal, as here.
            sliding_window=mask.window,
            **extra,
        )
        # Hugging Face's functions return (B, L, H, E).
        return out.transpose(1, 2), None


def _unsayable(problem: AttentionProblem) -> str | None:
    """What sequence lengths and (B, S) padding cannot say, and Hugging Face would silently leave out."""
    if {"padding", "documents"} <= problem.mask:
        return "it takes documents or padding, not both at once"
    if "documents" in problem.mask and problem.queries != problem.keys:
        return "it takes documents only with as many queries as keys"
    if "padding" in problem.mask and "causal" not in problem.mask:
        return "it also leaves out the queries at padded places, so it takes padding only under a causal mask"
    if {"padding", "window"} <= problem.mask:
        return "it counts a window in real keys, not in positions, so it takes a window or padding, not both at once"
    if not problem.ends_aligned:
        return "it takes the last query for the last key, which a cache of fixed size breaks"
    return None


def _document_bounds(documents: Tensor) -> tuple[Tensor, int]:
    """(documents + 1,) int32 offsets into the flattened batch, and the length of the longest document.

    ValueError for a document in several pieces, which its length does not tell.
    """
    pieces = (documents.diff(dim=1) != 0).sum(dim=1)
    numbers = (documents.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)
    if bool((pieces != numbers).any()):
        raise ValueError(
            "FlashAttention is told documents by their lengths, so each must lie in one piece: the tokens of one have "
            "others, or padding, between them"
        )
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents.diff(dim=1) != 0
    end = torch.tensor([documents.numel()], device=documents.device)
    bounds = torch.cat((starts.flatten().nonzero().flatten(), end))
    return bounds.int(), int(bounds.diff().max())


def _tiled(bounds: Tensor, repeats: int) -> Tensor:
    # One row of document numbers may stand for the whole batch.
    if repeats == 1:
        return bounds
    return torch.cat([bounds[:1], *(bounds[1:] + i * bounds[-1] for i in range(repeats))])


def _from_interface(name: str) -> Backend | None:
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ModuleNotFoundError:
        return None

    return HuggingFace(name) if name in ALL_ATTENTION_FUNCTIONS.valid_keys() else None


register_factory(_from_interface)
