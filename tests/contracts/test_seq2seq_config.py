"""The configuration of encoder-decoders: keys once for both sides, what goes where, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from clearhead.models import (
    ClearheadConfig,
    ClearheadEncoderConfig,
    ClearheadForConditionalGeneration,
    ClearheadSeq2SeqConfig,
    ClearheadSeq2SeqModel,
)
from tests.contracts.model_cases import VARIANTS, tokens
from tests.contracts.seq2seq_cases import CASES, make_seq2seq, make_seq2seq_config

SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_keys_given_once_are_both_sides_and_a_side_s_own_go_before() -> None:
    config = ClearheadSeq2SeqConfig(
        **SIZES,
        attention="differential",
        encoder={"num_hidden_layers": 3, "sliding_window": 5},
        decoder={"attention": "collinear"},
    )
    encoder, decoder = config.sides
    assert isinstance(encoder, ClearheadEncoderConfig) and type(decoder) is ClearheadConfig
    assert (encoder.num_hidden_layers, decoder.num_hidden_layers) == (3, 2)
    assert (encoder.attention, decoder.attention) == ("differential", "collinear")
    assert (encoder.sliding_window, decoder.sliding_window) == (5, None)
    assert encoder.eos_token_id == decoder.eos_token_id == config.eos_token_id == 2
    assert config.hidden_size == 24 and config.attention == "collinear"
    assert config.decoder_start_token_id == 1
    config.initializer_range = 0.1
    assert encoder.initializer_range == decoder.initializer_range == 0.1
    with pytest.raises(AttributeError, match="no attribute 'hiden_size'"):
        _ = config.hiden_size
    whole = ClearheadSeq2SeqConfig(encoder=encoder, decoder=decoder)
    assert whole.pad_token_id == 0 and whole.encoder is encoder


@pytest.mark.parametrize(
    ("attention", "position", "expected"),
    [
        ("softmax", "nope", "softmax"),
        ("differential", "nope", "differential"),
        ("differential_v2", "rope", "differential_v2"),
        ("collinear", "nope", "softmax"),
        ("collinear", "rope", "collinear"),
        ("differential_collinear", "nope", "differential"),
        ("differential_v2_collinear", "nope", "differential_v2"),
        ("differential_v2_collinear", "rope", "differential_v2_collinear"),
        ("dex", "nope", "dex"),
    ],
)
def test_what_stands_between_where_nothing_is_said(attention: str, position: str, expected: str) -> None:
    config = ClearheadSeq2SeqConfig(**SIZES, attention=attention, cross_position=position)
    assert config.cross_variant[0] == expected


def test_options_across() -> None:
    options = {"mode": "slack", "lambda_init": 0.5}
    config = ClearheadSeq2SeqConfig(**SIZES, attention="differential_collinear", attention_options=options)
    assert config.cross_variant == ("differential", {"lambda_init": 0.5})
    config = ClearheadSeq2SeqConfig(**SIZES, attention="differential", cross_attention="softmax")
    assert config.cross_variant == ("softmax", {})
    config = ClearheadSeq2SeqConfig(
        **SIZES,
        attention="softmax",
        cross_attention="differential",
        cross_attention_options={"lambda_init": 0.8},
    )
    model = ClearheadForConditionalGeneration(config)
    assert model.model.decoder.layers[0].cross_attn.variant.lambda_init == 0.8
    assert model.model.decoder.layers[0].self_attn.variant.sizes.query_streams == 1


REFUSED = [
    ({"cross_position": "xpos"}, "grows without bound towards later keys"),
    ({"cross_position": "alibi"}, "takes distances within one sequence"),
    ({"cross_position": "rop"}, "rope"),
    ({"cross_attention": "collinear"}, "defined by rotary angles: cross_position must be rope, not 'nope'"),
    ({"cross_attention": "differentail"}, "differential"),
    (
        {"cross_attention_options": {"lambda": 1}},
        "cross-attention: attention 'softmax' has no option 'lambda'",
    ),
    (
        {
            "cross_position": "rope",
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
        },
        "the length of a target that is not written yet",
    ),
    ({"position": "xpos"}, "encoder: "),
    ({"decoder": {"compact_cache": True, "attention": "collinear"}}, "decoder: compact_cache is for"),
    ({"decoder": {"hidden_size": 25}}, "decoder: hidden_size"),
    ({"encoder": {"attention": "nothing"}}, "encoder: "),
    (
        {"tie_word_embeddings": True, "encoder": {"hidden_size": 48}},
        "hidden_size is 48 in the encoder and 24",
    ),
    ({"decoder_start_token_id": 41}, "decoder_start_token_id is 41; the decoder knows 0 to 40"),
    ({"encoder": ClearheadConfig()}, "encoder must be a ClearheadEncoderConfig"),
    ({"decoder": ClearheadEncoderConfig()}, "decoder must be a ClearheadConfig"),
    ({"decoder": ClearheadConfig()}, "cannot be given beside it"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason[:30] for _, reason in REFUSED])
def test_what_is_refused_says_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        ClearheadSeq2SeqConfig(**(SIZES | changes))
    assert reason in str(error.value)


@pytest.mark.parametrize(("name", "cross_position"), CASES)
@torch.no_grad()
def test_save_and_load_through_the_auto_classes(name: str, cross_position: str, tmp_path: Path) -> None:
    model = make_seq2seq(name, cross_position=cross_position)
    source, target = tokens(2, 6), tokens(2, 4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ClearheadForConditionalGeneration)
    expected = model(source, decoder_input_ids=target)
    assert torch.equal(loaded(source, decoder_input_ids=target).logits, expected.logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, ClearheadSeq2SeqModel)
    states = base(source, decoder_input_ids=target).last_hidden_state
    assert torch.equal(loaded.lm_head(states), expected.logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.attention, config.attention_options) == VARIANTS[name]
    differing = {key for key, value in config.to_dict().items() if value != model.config.to_dict()[key]}
    assert differing <= {"_name_or_path", "dtype", "encoder", "decoder"}
    for side in ("encoder", "decoder"):
        saved, made = getattr(config, side).to_dict(), getattr(model.config, side).to_dict()
        assert {key for key in saved if saved[key] != made.get(key)} <= {"dtype", "_name_or_path"}


def test_one_matrix_where_embeddings_are_tied(tmp_path: Path) -> None:
    model = make_seq2seq("differential", tie_word_embeddings=True, encoder={"hidden_size": 24})
    one = model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is one and model.model.encoder.embed_tokens.weight is one
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight
    source = tokens(2, 5)
    with torch.no_grad():
        found = loaded(source, decoder_input_ids=source).logits
        assert torch.equal(found, model(source, decoder_input_ids=source).logits)
    apart = make_seq2seq("differential")
    assert apart.lm_head.weight is not apart.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_is_both_sides_s(tied: bool) -> None:
    sizes = {"encoder": {"hidden_size": 24}} if tied else {}
    model = make_seq2seq("softmax", tie_word_embeddings=tied, **sizes)
    model.resize_token_embeddings(50)
    assert (
        model.get_encoder().embed_tokens.num_embeddings
        == model.get_decoder().embed_tokens.num_embeddings
        == 50
    )
    assert model.lm_head.out_features == model.vocab_size == 50
    assert {side.vocab_size for side in model.config.sides} == {50}
    source = torch.full((1, 4), 49)
    assert model(source, labels=source).logits.shape == (1, 4, 50)
    assert (model.lm_head.weight is model.get_encoder().embed_tokens.weight) == tied


def test_lambda_vectors_stay_in_float32_when_a_checkpoint_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    make_seq2seq("differential").save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    vectors = 0
    for key, parameter in loaded.named_parameters():
        vector = "lambda_q" in key or "lambda_k" in key
        vectors += vector
        assert parameter.dtype == (torch.float32 if vector else torch.bfloat16), key
    assert vectors == 3 * 2 * 4
    assert loaded(tokens(2, 7), decoder_input_ids=tokens(2, 3)).logits.dtype == torch.bfloat16


def test_one_implementation_for_all_three_attentions() -> None:
    model = ClearheadForConditionalGeneration._from_config(
        make_seq2seq_config("differential"), attn_implementation="eager"
    )
    assert {side.config._attn_implementation for side in (model.get_encoder(), model.get_decoder())} == {
        "eager"
    }
    model.set_attn_implementation("clearhead")
    assert {side.config._attn_implementation for side in (model.get_encoder(), model.get_decoder())} == {
        "clearhead"
    }
