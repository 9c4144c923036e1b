"""The common model tests of transformers on the encoder-decoders, with its own T5 and BART as controls.

`make test-peers` runs this file beside `common`; the suite does not.
"""

import unittest
from typing import Any

import torch
import transformers

import clearhead.models
from tests.peers import skips
from tests.peers.common import SIZES, CommonTests, ConfigTester, Tester, ids_tensor

# The same sizes in the words of the controls.
T5_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "num_labels": 3,
}
BART_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "num_labels": 3,
}
# One matrix for all embeddings, as in the controls: the tests embed both sequences by one.
OUR_SIZES = SIZES | {"decoder_start_token_id": 0, "tie_word_embeddings": True}


class Seq2SeqTester(Tester):
    """What the common tests ask of an encoder-decoder: sizes of both sides, and inputs for both."""

    is_encoder_decoder = True
    # The tests make labels as long as the source.
    encoder_seq_length = decoder_seq_length = 7
    sizes: dict[str, Any]

    def get_config(self) -> Any:
        return self.config_class(**self.sizes, **self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        source = ids_tensor([self.batch_size, self.encoder_seq_length], self.vocab_size)
        target = ids_tensor([self.batch_size, self.decoder_seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": source,
            "attention_mask": torch.tril(torch.ones_like(source)),
            "decoder_input_ids": target,
            "decoder_attention_mask": torch.tril(torch.ones_like(target)),
        }


class Seq2SeqTests(CommonTests):
    """One class of tests of encoder-decoders; subclasses say which model."""

    family = transformers
    prefix = "T5"
    language = "ForConditionalGeneration"
    heads: tuple[str, ...] = ()
    is_encoder_decoder = True
    sizes: dict[str, Any] = T5_SIZES
    skipped = skips.EVERYWHERE | skips.SEQ2SEQ

    def setUp(self) -> None:
        config = self.named("Config")
        base, language = self.named("Model"), self.named(self.language)
        heads = 4
        if issubclass(config, clearhead.models.ClearheadSeq2SeqConfig):
            heads = config(**self.sizes, **self.settings).sides[1].make_variant(0).sizes.heads
        self.model_tester = Seq2SeqTester(config, base, language, heads, **self.settings)
        self.model_tester.sizes = self.sizes
        self.all_model_classes = (base, language)
        # Keys that are given once for both sides are saved in the sides' tables.
        saved = config().to_dict()
        sizes = {name: size for name, size in self.sizes.items() if name in saved}
        self.config_tester = ConfigTester(self, config_class=config, has_text_modality=False, **sizes)


class TestT5(Seq2SeqTests, unittest.TestCase):
    skipped = Seq2SeqTests.skipped | skips.T5


class TestBart(Seq2SeqTests, unittest.TestCase):
    prefix = "Bart"
    sizes = BART_SIZES


class OurSeq2Seq(Seq2SeqTests):
    family = clearhead.models
    sizes = OUR_SIZES
    skipped = skips.EVERYWHERE | skips.SEQ2SEQ | skips.OURS | skips.OUR_SEQ2SEQ

    @classmethod
    def named(cls, suffix: str) -> type:
        found: type = getattr(cls.family, f"Clearhead{'' if suffix == cls.language else 'Seq2Seq'}{suffix}")
        return found


CASES: dict[str, dict[str, Any]] = {
    "Softmax": {"attention": "softmax"},
    "Differential": {"attention": "differential"},
    "DifferentialV2": {"attention": "differential_v2"},
    "Collinear": {"attention": "collinear"},
    "CollinearAcross": {"attention": "collinear", "cross_position": "rope"},
    "DifferentialCollinear": {"attention": "differential_collinear"},
    "DifferentialV2CollinearAcross": {"attention": "differential_v2_collinear", "cross_position": "rope"},
    "DifferentialWindow": {"attention": "differential", "layers": [{}, {"sliding_window": 3}]},
}
for _name, _settings in CASES.items():
    _members = {"settings": _settings}
    globals()[f"TestSeq2Seq{_name}"] = type(f"TestSeq2Seq{_name}", (OurSeq2Seq, unittest.TestCase), _members)
