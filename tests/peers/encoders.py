"""The common model tests of transformers on the encoders, with its own BERT and ModernBERT as controls.

`make test-peers` runs this file beside `common`; the suite does not.
"""

import unittest
from typing import Any

import clearhead.models
from tests.peers import skips
from tests.peers.common import HEADS, CommonTests


class EncoderTests(CommonTests):
    """One class of tests of encoders; subclasses say which model."""

    prefix = "Bert"
    language = "ForMaskedLM"
    heads = (*HEADS, "ForMultipleChoice")
    # BERT's head for answers has one output a label, and takes two apart.
    special: dict[str, Any] = {"num_labels": 2}  # noqa: RUF012


class TestBert(EncoderTests, unittest.TestCase):
    pass


class TestModernBert(EncoderTests, unittest.TestCase):
    prefix = "ModernBert"
    special: dict[str, Any] = {"num_labels": 2, "cls_token_id": 1, "sep_token_id": 2}  # noqa: RUF012


class OurEncoders(EncoderTests):
    family = clearhead.models
    skipped = skips.EVERYWHERE | skips.OURS | skips.ENCODERS

    @classmethod
    def named(cls, suffix: str) -> type:
        found: type = getattr(cls.family, f"Clearhead{'' if suffix == cls.language else 'Encoder'}{suffix}")
        return found

    def _get_tp_config(self, tie_word_embeddings: bool | None = None) -> Any:
        config = super()._get_tp_config(tie_word_embeddings)
        # V1 pairs the twin's heads: of two key-value heads it would have one, and two ranks need one each.
        config.num_key_value_heads = 4
        return config

    # Logits of collinear attention are cubic in a layer's input: with matrices of 0.02 a scaling moves outputs by about
    # the 1e-5 that the tests look for, with those of 0.1 by 0.04.
    def test_model_rope_scaling_from_config_0_linear(self) -> None:
        self.model_tester.settings |= {"initializer_range": 0.1}
        super().test_model_rope_scaling_from_config_0_linear()

    def test_model_rope_scaling_from_config_2_yarn(self) -> None:
        self.model_tester.settings |= {"initializer_range": 0.1}
        super().test_model_rope_scaling_from_config_2_yarn()


CASES: dict[str, dict[str, Any]] = {
    "Softmax": {"attention": "softmax"},
    "Differential": {"attention": "differential"},
    "DifferentialV2": {"attention": "differential_v2"},
    "Collinear": {"attention": "collinear"},
    "CollinearSlack": {"attention": "collinear", "attention_options": {"mode": "slack"}},
    "DifferentialCollinear": {"attention": "differential_collinear"},
    "DifferentialV2Collinear": {"attention": "differential_v2_collinear"},
    "DifferentialAlibi": {"attention": "differential", "position": "alibi"},
    "DifferentialWindow": {"attention": "differential", "layers": [{}, {"sliding_window": 3}]},
}
for _name, _settings in CASES.items():
    _skipped = OurEncoders.skipped | (skips.WITHOUT_ANGLES if "position" in _settings else {})
    _members = {"settings": _settings, "skipped": _skipped}
    globals()[f"TestEncoder{_name}"] = type(f"TestEncoder{_name}", (OurEncoders, unittest.TestCase), _members)
