"""The common model tests of transformers on this family, with its own LLaMA and DiffLlama as controls.

`make test-peers` downloads them (the source distribution of the pinned version) and runs this file; the suite does not.
"""

import unittest
from typing import Any
from unittest.mock import patch

import torch
import transformers

from tests.peers import skips
from tests.peers.stand_ins import GenerationTesterMixin, put_in_place

put_in_place()

from transformers_tests import test_modeling_common  # noqa: E402
from transformers_tests import test_tensor_parallel_mixin as tensor_parallel  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

import clearhead.models  # noqa: E402
from clearhead.models import ClearheadConfig  # noqa: E402

# transformers runs those of several processes for a few of its models only.
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}


class Tester:
    """What the common tests ask of a model: sizes as its attention maps have them, and inputs."""

    is_training = True
    batch_size, seq_length, num_choices = 13, 7, 4
    num_hidden_layers, hidden_size, vocab_size, pad_token_id = 2, 32, 99, 0

    def __init__(
        self, config_class: type, base: type, language: type, attention_heads: int, **settings: Any
    ) -> None:
        # Under this name the tests ask for whatever model has a head for tokens.
        self.config_class, self.base_model_class, self.causal_lm_class = config_class, base, language
        self.num_attention_heads, self.settings = attention_heads, settings

    def get_config(self) -> Any:
        return self.config_class(**{**SIZES, **self.settings})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Padding on the right of the first rows.
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def set_rope_parameters(config: Any, parameters: dict[str, Any]) -> None:
    """In place of the tests' own, which adds to what a configuration has: a scaling is then another one's in part."""
    # ModernBERT has them for each type of layers.
    kinds = [key for key, value in (config.rope_parameters or {}).items() if isinstance(value, dict)]
    config.rope_parameters = {kind: dict(parameters) for kind in kinds} or dict(parameters)
    for name in config.sub_configs:
        set_rope_parameters(getattr(config, name), parameters)


class CommonTests(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, tensor_parallel.TensorParallelTesterMixin
):
    """One class of tests; subclasses say which model."""

    family = transformers
    prefix = "Llama"
    language = "ForCausalLM"
    heads: tuple[str, ...] = HEADS
    settings: dict[str, Any] = {}  # noqa: RUF012
    # What all configurations of the family have beside the sizes.
    special: dict[str, Any] = {}  # noqa: RUF012
    skipped: dict[str, str] = skips.EVERYWHERE
    model_tester: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, reason in cls.skipped.items():
            setattr(cls, name, unittest.skip(reason)(getattr(cls, name)))

    @classmethod
    def named(cls, suffix: str) -> type:
        return getattr(cls.family, cls.prefix + suffix)

    def setUp(self) -> None:
        config = self.named("Config")
        heads = SIZES["num_attention_heads"]
        if issubclass(config, ClearheadConfig):
            heads = config(**SIZES, **self.settings).make_variant(0).sizes.heads
        base, language = self.named("Model"), self.named(self.language)
        self.model_tester = Tester(config, base, language, heads, **self.special, **self.settings)
        self.all_model_classes = (base, language, *(self.named(head) for head in self.heads))
        sizes = {name: size for name, size in (SIZES | self.special).items() if name != "num_labels"}
        self.config_tester = ConfigTester(self, config_class=config, **sizes)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_rope_scaling_from_config_1_dynamic(self) -> None:
        # The test before it in the same body leaves a trained length of 16384, from which this library counts.
        with patch.object(test_modeling_common, "_set_config_rope_params", set_rope_parameters):
            super().test_model_rope_scaling_from_config_1_dynamic()


class TestLlama(CommonTests, unittest.TestCase):
    pass


class TestDiffLlama(CommonTests, unittest.TestCase):
    prefix = "DiffLlama"


class Ours(CommonTests):
    family = clearhead.models
    prefix = "Clearhead"
    skipped = skips.EVERYWHERE | skips.OURS

    def _get_tp_config(self, tie_word_embeddings: bool | None = None) -> Any:
        config = super()._get_tp_config(tie_word_embeddings)
        # V1 pairs the twin's heads: of two key-value heads it would have one, and two ranks need one each.
        config.num_key_value_heads = 4
        return config


CASES: dict[str, dict[str, Any]] = {
    "Softmax": {"attention": "softmax"},
    "Differential": {"attention": "differential"},
    "DifferentialV2": {"attention": "differential_v2"},
    "Collinear": {"attention": "collinear"},
    "CollinearSlack": {"attention": "collinear", "attention_options": {"mode": "slack"}},
    "DifferentialCollinear": {"attention": "differential_collinear"},
    "DifferentialV2Collinear": {"attention": "differential_v2_collinear"},
    "CollinearCompact": {"attention": "collinear", "compact_cache": True},
    "DifferentialAlibi": {"attention": "differential", "position": "alibi"},
    "DifferentialV2Alibi": {"attention": "differential_v2", "position": "alibi"},
    "DifferentialNope": {"attention": "differential", "position": "nope"},
    "DifferentialV2Nope": {"attention": "differential_v2", "position": "nope"},
}
for _name, _settings in CASES.items():
    _skipped = Ours.skipped | (skips.WITHOUT_ANGLES if _settings.get("position") in ("alibi", "nope") else {})
    _members = {"settings": _settings, "skipped": _skipped}
    globals()[f"Test{_name}"] = type(f"Test{_name}", (Ours, unittest.TestCase), _members)
