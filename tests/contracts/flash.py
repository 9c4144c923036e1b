"""A stand-in for the flash-attn package: the same two functions, recording what they are given, in plain PyTorch.

It goes in below Hugging Face's own `flash_attention_forward`, which therefore unpads, cuts sequences and chooses
between the two as it does on a GPU. Like the real kernels it refuses values that are not as wide as the keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils

from clearhead.core.dispatch import FLOATS
from clearhead.engines import hf
from tests.oracles import softmax


@dataclass
class Recorder:
    """Shapes of every call, (q, k, v), and whether sequences of unequal length were told apart."""

    calls: list[tuple[torch.Size, torch.Size, torch.Size]] = field(default_factory=list)
    variable_length: list[bool] = field(default_factory=list)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: tuple[int, int]
    ) -> Tensor:
        """(B, L, H, D) layout, causality and window aligned to the last key as in flash-attn >= 2.1.

        `window` is how many keys to the left and to the right are seen beside a query's own, -1 for all.
        """
        assert window[0] == window[1], "Hugging Face only passes windows of two equal sides"
        sides = None if window[0] < 0 else window[0] + 1
        seen = softmax.visible(q.shape[0], q.shape[1], k.shape[1], causal=causal, window=sides)[:, None]
        parts = [x.transpose(1, 2).double() for x in (q, k, v)]
        return softmax.attention(*parts, allowed=seen, scale=scale).transpose(1, 2).to(q.dtype)

    def note(self, q: Tensor, k: Tensor, v: Tensor, variable_length: bool) -> None:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1], "flash-attn takes values as wide as keys"
        assert q.shape[-2] % k.shape[-2] == 0
        assert k.shape[-2] == v.shape[-2]
        self.calls.append((q.shape, k.shape, v.shape))
        self.variable_length.append(variable_length)

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float = 0.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        self.note(q, k, v, False)
        assert dropout_p == 0.0
        return self.attend(q, k, v, causal, softmax_scale, window_size)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float = 0.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        self.note(q, k, v, True)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q[-1]) == q.shape[0]
        assert int(cu_seqlens_k[-1]) == k.shape[0]
        assert int(cu_seqlens_q.diff().max()) <= int(max_seqlen_q)
        assert int(cu_seqlens_k.diff().max()) <= int(max_seqlen_k)
        pieces = []
        for (a, b), (c, d) in zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True):
            one = (q[None, a:b], k[None, c:d], v[None, c:d])
            pieces.append(self.attend(*one, causal, softmax_scale, window_size)[0])
        return torch.cat(pieces)


def _spans(bounds: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(bounds.tolist()))


@contextmanager
def stand_in() -> Iterator[Recorder]:
    """flash_attention_2 as if flash-attn were installed and ran on the CPU in any precision."""
    recorder = Recorder()
    functions = (
        recorder.flash_attn_func,
        recorder.flash_attn_varlen_func,
        None,
        utils._pad_input,
        utils._unpad_input,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
        patch.setattr(utils, "_loaded_implementation", None)
        caps = replace(hf.KNOWN_CAPS["flash_attention_2"], devices=frozenset({"cpu"}), dtypes=FLOATS)
        patch.setitem(hf.KNOWN_CAPS, "flash_attention_2", caps)
        yield recorder
