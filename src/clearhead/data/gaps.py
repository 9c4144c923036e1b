"""Text with a gap: a source in which one run of tokens is replaced by the mask token, and the run as its target.

This is text infilling with one gap a row (BART's, Lewis et al. 2020, with its lengths uniform in place of Poisson):
pairs for an encoder-decoder from any text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clearhead.data.examples import padded
from clearhead.data.packing import IGNORED, Example, PackedText
from clearhead.data.readers import CorpusError
from clearhead.data.streamed import MixedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Last word of the seed of a random stream, so that gaps share no random numbers with masks.
STREAM = 0x67617073


class GapRows:
    """Rows of text of `length` tokens, one gap of 1 to `target_length` − 1 tokens in each; row i depends on (seed, i).

    A row is {"input_ids", "attention_mask", "decoder_input_ids", "labels"}: the text with the gap, padded to `length`;
    what is missing, behind bos; and the same with eos in place of bos, −100 behind it. A gap takes at most a quarter of
    the row and never its first token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text: PackedText | MixedRows,
        target_length: int,
        rows: int,
        seed: int,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise CorpusError(
                "the tokenizer has no mask token, which stands for the gap: set mask_token in its tokenizer_config.json"
            )
        self.mask = int(tokenizer.mask_token_id)
        self.pad = int(tokenizer.pad_token_id)
        self.bos = int(tokenizer.bos_token_id)
        self.eos = int(tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
        self.text = text
        self.target_length = target_length
        self.largest = max(1, min(target_length - 1, text.length // 4))
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> str:
        """What the row is, for the log."""
        return "text"

    def __getitem__(self, index: int) -> Example:
        ids = self.text[index]["input_ids"]
        rng = np.random.default_rng((self.seed, index, STREAM))
        size = int(rng.integers(1, self.largest + 1))
        start = int(rng.integers(1, len(ids) - size + 1))
        source = np.concatenate([ids[:start], [self.mask], ids[start + size :]]).astype(np.int64)
        target = np.concatenate([[self.bos], ids[start : start + size], [self.eos]]).astype(np.int64)
        return {
            "input_ids": padded(source, len(ids), self.pad),
            "attention_mask": padded(np.ones_like(source), len(ids), 0),
            "decoder_input_ids": padded(target[:-1], self.target_length, self.pad),
            "labels": padded(target[1:], self.target_length, IGNORED),
        }
