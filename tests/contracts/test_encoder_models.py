"""Everything a Hugging Face encoder is expected to do."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F

from clearhead.models import (
    ClearheadEncoderConfig,
    ClearheadEncoderForSequenceClassification,
)
from tests.contracts.encoder_cases import (
    encoder_config,
    make_encoder,
    oracle_logits,
    weights_of,
)
from tests.contracts.model_cases import LAYERS, VARIANTS, tokens
from tests.contracts.support import assert_within, distance, relative_error

every_variant = pytest.mark.parametrize("name", VARIANTS)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def test_attention_modules_say_that_they_are_not_causal() -> None:
    model = make_encoder("differential")
    assert [layer.self_attn.is_causal for layer in model.model.layers] == [False] * LAYERS
    with pytest.raises(ValueError, match="is_causal=True: these are encoders"):
        model(tokens(1, 4), is_causal=True)
    model(tokens(1, 4), is_causal=False)
    with pytest.raises(TypeError, match="no argument 'use_cash'"):
        model(tokens(1, 4), use_cash=True)


REFUSED = {
    "position 'xpos' is defined for causal attention only": {"position": "xpos"},
    "'nope\" in every layer": {"position": "nope"},
    "use_cache has no meaning here: an encoder .* keeps no keys": {"use_cache": True},
    "compact_cache has no meaning": {"attention": "collinear", "compact_cache": True},
    "twin_heads has no meaning": {"twin_heads": {"num_attention_heads": 8, "num_key_value_heads": 8}},
    "classifier_pooling must be one of mean, first, not 'cls'": {"classifier_pooling": "cls"},
    "classifier_dropout must be at least 0": {"classifier_dropout": 1.0},
    "is defined by rotary angles": {"attention": "collinear", "position": "alibi"},
    "a 'clearhead' model, not of a 'clearhead_encoder' one": {"model_type": "clearhead"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_meaning_for_an_encoder_is_refused(reason: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=reason.replace("'nope\"", '"nope"')):
        ClearheadEncoderConfig.from_dict({"num_attention_heads": 8, "hidden_size": 32, **REFUSED[reason]})


def test_a_position_that_is_causal_only_in_some_layers_is_refused() -> None:
    with pytest.raises(StrictDataclassError, match="causal attention only"):
        encoder_config("softmax", layer_positions=["rope", "xpos"])


def test_mirrored_is_what_the_numbers_say() -> None:
    """`mirrored` against reversed rows: see the four cases of distance."""
    ids = tokens(2, 5)
    for name in VARIANTS:
        for changes in ({}, {"position": "alibi"}, {"layers": [{}, {"attention": "differential"}]}):
            if "collinear" in name and "position" in changes:
                continue
            model = make_encoder(name, dtype=torch.float64, **changes)
            moved = distance(model(ids.flip(1)).logits.flip(1), model(ids).logits)
            assert (moved < 1e-10) == model.config.mirrored, (name, changes)


def test_loss_is_the_mean_over_labelled_tokens() -> None:
    model, ids = make_encoder("differential"), tokens(2, 7)
    labels = ids.clone()
    labels[0, :3] = -100
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert distance(model(ids, labels=labels).loss, expected) < 1e-6
    found = model(ids, labels=labels, num_items_in_batch=22).loss
    assert distance(found, expected * 11 / 22) < 1e-6


def test_logits_of_the_labelled_tokens_alone() -> None:
    dense, sparse = (
        make_encoder("differential", dtype=torch.float64, sparse_prediction=sparse)
        for sparse in (False, True)
    )
    ids = tokens(2, 7)
    labels = ids.masked_fill(ids % 3 > 0, -100)
    assert 0 < int((labels != -100).sum()) < labels.numel()
    one, other = dense(ids, labels=labels), sparse(ids, labels=labels)
    assert distance(other.loss, one.loss) < 1e-10
    assert distance(other.logits, one.logits[labels != -100]) < 1e-10
    pairs = [
        torch.autograd.grad(out.loss, list(model.parameters()))
        for model, out in ((dense, one), (sparse, other))
    ]
    assert max(distance(a, b) for a, b in zip(*pairs, strict=True)) < 1e-10
    assert sparse(ids).logits.shape == dense(ids).logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@every_variant
def test_low_precision_is_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    model, ids = make_encoder(name, initializer_range=0.1).to(dtype), tokens(2, 7)
    expected, _ = oracle_logits(name, "gqa", model, weights_of(model), ids)
    found = model(ids).logits
    assert found.dtype == dtype
    model.set_attn_implementation("eager")
    plain = model(ids).logits
    assert_within([found], [expected], [plain], dtype)
    assert relative_error([plain], [expected]) < 20 * torch.finfo(dtype).eps


@every_variant
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    ids = tokens(2, 7)
    results = []
    for checkpointed in (False, True):
        model = make_encoder(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, attention_mask=torch.ones_like(ids).tril(2)).loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    assert all(g is not None for g in results[0].values())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


KINDS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "padded": {"attention_mask": PADDED},
    "packed": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2", "collinear"])
def test_compiles_as_one_graph_forward_and_backward(name: str, kind: str) -> None:
    """`fullgraph` raises at the first break; aot_eager traces both directions without generating code."""
    torch._dynamo.reset()
    model, ids = make_encoder(name, num_hidden_layers=1, sliding_window=3).train(), tokens(2, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = PADDED.bool() if kind == "padded" else torch.ones_like(ids).bool()
    labels = ids.masked_fill(~real, -100)
    expected = model(ids, labels=labels, **KINDS[kind])
    found = compiled(input_ids=ids, labels=labels, **KINDS[kind])
    assert distance(found.logits[real], expected.logits[real]) < 1e-5
    named = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(found.loss, named), torch.autograd.grad(expected.loss, named), strict=True
    )
    assert max(distance(a, b) for a, b in pairs) < 1e-5


def test_heads_for_whole_texts_compile() -> None:
    torch._dynamo.reset()
    model = make_encoder("differential", head=ClearheadEncoderForSequenceClassification, num_hidden_layers=1)
    ids = tokens(2, 6)
    with torch.no_grad():
        for given in ({}, {"attention_mask": PADDED}):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert distance(compiled(input_ids=ids, **given).logits, model(ids, **given).logits) < 1e-5
