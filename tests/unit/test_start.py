"""Weights of a recipe that does not say how large they start: by the width, the same rule for every arm."""

import math

import pytest
import torch

from clearhead import registry
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.models.start import standard_deviation, with_defaults

TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}


@pytest.mark.parametrize("attention", registry.VARIANTS)
def test_every_arm_starts_by_the_width(attention: str) -> None:
    torch.manual_seed(0)
    config = ClearheadConfig(vocab_size=300, attention=attention, **with_defaults(TINY, 128))
    assert config.max_position_embeddings == 128
    for name, weight in ClearheadForCausalLM(config).named_parameters():
        # What a retrofit adds starts as its paper says.
        if weight.ndim >= 2 and not name.endswith(("dex.weight", "_up.weight")):
            expected = 0.5 if "embed_tokens" in name else math.sqrt(2 / (5 * 64))
            # Five standard errors of a standard deviation.
            bound = 5 / math.sqrt(2 * weight.numel())
            assert float(weight.detach().std()) == pytest.approx(expected, rel=bound), name


def test_the_rule_is_the_published_one_and_a_recipe_has_the_last_word() -> None:
    assert [round(standard_deviation(width), 3) for width in (64, 512, 1000)] == [0.079, 0.028, 0.02]
    given = {"initializer_range": 0.3, "max_position_embeddings": 64, "embedding_initializer_range": 0.1}
    assert with_defaults(TINY | given, 128) == TINY | given
    assert with_defaults({}, 128)["initializer_range"] == standard_deviation(ClearheadConfig.hidden_size)
    # A tied embedding is the last layer's matrix too, which starts like the others.
    assert "embedding_initializer_range" not in with_defaults({"tie_word_embeddings": True}, 128)
    assert ClearheadConfig().initializer_range == 0.02
    with pytest.raises(ValueError, match="width must be at least 1"):
        standard_deviation(0)
