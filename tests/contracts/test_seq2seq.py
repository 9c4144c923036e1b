"""Encoder-decoders against the oracle, and everything a Hugging Face encoder-decoder is expected to do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.encoder_cases import weights_of
from tests.contracts.model_cases import HEAD, LAYERS, LAYOUTS, VARIANTS, WIDTH, tokens
from tests.contracts.seq2seq_cases import (
    CASES,
    PAD,
    SOURCE_WIDTH,
    START,
    make_seq2seq,
    seq2seq_oracle,
)
from tests.contracts.support import assert_within, distance, relative_error
from tests.oracles.seq2seq import loss, shifted

every_case = pytest.mark.parametrize(("name", "cross_position"), CASES)
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def padded_source() -> tuple[Tensor, Tensor]:
    """Three sources of 6, 4 and 3 tokens: whole, padded on the left, and on both sides."""
    rows, mask = tokens(3, 6, seed=5), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, :1] = 0
    mask[2, 4:] = 0
    return rows.masked_fill(mask == 0, PAD), mask


@every_layout
@every_case
def test_logits_maps_and_gradients_are_the_oracle_s(name: str, cross_position: str, layout: str) -> None:
    model = make_seq2seq(name, layout, torch.float64, cross_position=cross_position)
    (source, mask), target = padded_source(), tokens(3, 5)
    weights = weights_of(model)
    logits, *maps = seq2seq_oracle(
        name, layout, weights, source, target, cross_position=cross_position, source_real=mask.bool()
    )
    found = model(source, attention_mask=mask, decoder_input_ids=target)
    assert distance(found.logits, logits) < 1e-10
    with_maps = model(source, attention_mask=mask, decoder_input_ids=target, output_attentions=True)
    assert distance(with_maps.logits, logits) < 1e-10
    rows = mask.bool()[:, None, :, None]
    for ours, theirs in zip(
        (with_maps.encoder_attentions, with_maps.decoder_attentions, with_maps.cross_attentions),
        maps,
        strict=True,
    ):
        assert len(ours) == LAYERS
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            seen = rows if a.shape[2] == 6 else torch.ones(())
            assert distance(a * seen, b * seen) < 1e-10, index
    # What a padded token of the source would have said is nobody's.
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * pull).sum().backward()
    (found.logits * pull).sum().backward()
    for key, parameter in model.named_parameters():
        expected = weights[key].grad
        assert expected is not None and parameter.grad is not None, key
        scale = max(float(expected.abs().max()), 1.0)
        assert distance(parameter.grad, expected) < 1e-10 * scale, key


@every_case
def test_padding_of_the_source_changes_nothing(name: str, cross_position: str) -> None:
    """On either side; slack collinear attention, for which absolute places matter, counts real tokens alone."""
    model = make_seq2seq(name, dtype=torch.float64, cross_position=cross_position)
    row, target = tokens(1, 5, seed=3), tokens(1, 4)
    alone = model(row, decoder_input_ids=target).logits
    padded = torch.cat((row.new_zeros(1, 2), row, row.new_zeros(1, 1)), dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    assert distance(model(padded, attention_mask=mask, decoder_input_ids=target).logits, alone) < 1e-10
    own = torch.tensor([[0, 0, 1, 1, 1, 1]])
    moved = torch.cat((target.new_zeros(1, 2), target), dim=1)
    found = model(row, decoder_input_ids=moved, decoder_attention_mask=own).logits[:, 2:]
    assert distance(found, alone) < 1e-10


def cross_scores(name: str, cross_position: str, shift: int, gap: int) -> Tensor:
    """Logits (B, H, L, S) of one cross-attention with target and source moved by `shift`, the source by `gap` more."""
    decoder = make_seq2seq(name, dtype=torch.float64, cross_position=cross_position).get_decoder()
    rng = torch.Generator().manual_seed(1)
    states = torch.randn(1, 5, SOURCE_WIDTH, dtype=torch.float64, generator=rng)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64, generator=rng)
    here, there = torch.arange(4)[None] + shift, torch.arange(5)[None] + shift + gap
    rotation = decoder.cross_position(here, there, None, torch.float64)
    heads = decoder.layers[0].cross_attn.project(x, states, rotation)
    return heads.q[0] @ heads.k[0].repeat_interleave(2, dim=1).mT


@pytest.mark.parametrize(
    ("name", "cross_position", "relative"),
    [
        ("softmax", "nope", True),
        ("softmax", "rope", True),
        ("collinear", "rope", True),
        ("collinear_strict", "rope", True),
        ("collinear_slack", "rope", False),
    ],
)
@torch.no_grad()
def test_what_positions_across_mean(name: str, cross_position: str, relative: bool) -> None:
    """Nothing without angles; with them the difference of the places in target and source, in slack their sum too."""
    expected = cross_scores(name, cross_position, 0, 0)
    assert (distance(cross_scores(name, cross_position, 7, 0), expected) < 1e-10) == relative
    assert (distance(cross_scores(name, cross_position, 0, 3), expected) < 1e-10) == (
        cross_position == "nope"
    )


@every_layout
def test_parameters_equal_the_twin_s(layout: str) -> None:
    """Twins differ in `attention` alone, cross-attention included: collinear has the twin's weights on all three."""
    counts = {
        name: sum(p.numel() for p in make_seq2seq(name, layout).parameters())
        for name in ("softmax", "differential", "differential_v2", "collinear", "differential_collinear")
    }
    assert counts["collinear"] == counts["softmax"]
    if layout != "mqa":
        # Four λ vectors of d and a norm weight of 2d, in each of the three attentions of a layer.
        assert counts["differential"] == counts["softmax"] + 6 * HEAD * 3 * LAYERS
    assert counts["differential_collinear"] == counts["differential"]
    heads = make_seq2seq("softmax", layout).config.num_attention_heads
    # Queries and λ, from the encoder's width once and from the decoder's twice.
    added = heads * (HEAD + 1) * (SOURCE_WIDTH + 2 * WIDTH) * LAYERS
    assert counts["differential_v2"] == counts["softmax"] + added


@torch.no_grad()
def test_lambda_of_cross_attention_is_made_of_the_decoder_s_tokens() -> None:
    model, source, target = make_seq2seq("differential_v2", dtype=torch.float64), tokens(2, 6), tokens(2, 4)
    seen: list[Tensor] = []
    variant = model.model.decoder.layers[1].cross_attn.variant
    variant.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    model(source, decoder_input_ids=target)
    assert seen[0].shape == (2, 4, WIDTH)
    assert seen[1].shape == (2, model.config.num_attention_heads, 4, 1)


def test_loss_is_that_of_the_shifted_target() -> None:
    model, source = make_seq2seq("differential"), tokens(2, 6)
    labels = tokens(2, 5, seed=4)
    labels[0, 3:] = -100
    found = model(source, labels=labels)
    read = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(read, shifted(labels, START, PAD))
    logits = model(source, decoder_input_ids=read).logits
    assert torch.equal(found.logits, logits)
    assert abs(float(found.loss) - float(loss(logits.double(), labels))) < 1e-5
    summed = model(source, labels=labels, num_items_in_batch=16).loss
    assert abs(float(summed) - float(found.loss) * 8 / 16) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
@torch.no_grad()
def test_low_precision_is_as_good_as_eager(name: str, cross_position: str, dtype: torch.dtype) -> None:
    source, target = tokens(2, 6), tokens(2, 5)
    model = make_seq2seq(name, cross_position=cross_position, initializer_range=0.1).to(dtype)
    weights = weights_of(model)
    expected = seq2seq_oracle(name, "gqa", weights, source, target, cross_position=cross_position)[0]
    found = model(source, decoder_input_ids=target).logits
    assert found.dtype == dtype
    model.set_attn_implementation("eager")
    plain = model(source, decoder_input_ids=target).logits
    assert_within([found], [expected], [plain], dtype)
    assert relative_error([plain], [expected]) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["differential", "differential_v2", "collinear"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    source, labels = tokens(2, 6), tokens(2, 5, seed=2)
    results = []
    for checkpointed in (False, True):
        model = make_seq2seq(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # What checkpointing of the old kind needs of any model.
            model.enable_input_require_grads()
            model.get_decoder().enable_input_require_grads()
        model(source, labels=labels).loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    assert all(g is not None for g in results[0].values())
    # Old checkpointing adds the gradients of the source's states up in another order.
    bound = 1e-5 if reentrant else 0.0
    assert max(distance(results[0][key], results[1][key]) for key in results[0]) <= bound


@pytest.mark.parametrize(
    ("name", "cross_position"), [("differential", "nope"), ("differential_v2", "rope"), ("collinear", "rope")]
)
def test_compiles_as_one_graph_forward_and_backward(name: str, cross_position: str) -> None:
    """`fullgraph` raises at the first break; aot_eager traces both directions without generating code."""
    torch._dynamo.reset()
    model = make_seq2seq(name, cross_position=cross_position).train()
    (source, mask), labels = padded_source(), tokens(3, 5, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(source, attention_mask=mask, labels=labels)
    expected_gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    found = compiled(input_ids=source, attention_mask=mask, labels=labels)
    gradients = torch.autograd.grad(found.loss, list(model.parameters()))
    assert distance(found.logits, expected.logits) < 1e-5
    assert max(distance(a, b) for a, b in zip(gradients, expected_gradients, strict=True)) < 1e-4


@every_case
@torch.no_grad()
def test_attention_implementations_agree(name: str, cross_position: str) -> None:
    model, target = make_seq2seq(name, cross_position=cross_position), tokens(3, 5)
    source, mask = padded_source()
    logits: dict[str, Tensor] = {}
    for implementation in ("clearhead", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(source, attention_mask=mask, decoder_input_ids=target).logits
    assert max(distance(logits["eager"], logits[other]) for other in ("clearhead", "sdpa")) < 5e-5
    with pytest.raises(ValueError, match="maps"):
        model.set_attn_implementation("sdpa")
        model(source, decoder_input_ids=target, output_attentions=True)


@every_variant
def test_lora_on_the_projections_trains(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_seq2seq(name, initializer_range=0.1)
    source, labels = tokens(4, 8), tokens(4, 6, seed=2)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM"))
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * LAYERS * len(targets) * 2
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        found = model(input_ids=source, labels=labels).loss
        found.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(found.item())
    assert losses[-1] < losses[0] - 0.1
    after = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())


def test_a_frozen_decoder_trains_the_encoder_through_cross_attention() -> None:
    model, source, labels = make_seq2seq("differential"), tokens(2, 6), tokens(2, 4)
    model.get_decoder().requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model(source, labels=labels).loss.backward()
    gradients = [p.grad for p in model.get_encoder().parameters()]
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients)


def test_packed_documents_and_other_masks_are_refused() -> None:
    model, ids = make_seq2seq("softmax"), tokens(1, 6)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed documents: nothing says"):
        model(ids, decoder_input_ids=ids, decoder_position_ids=places, use_cache=False)
    with pytest.raises(ValueError, match="packed documents: nothing says"):
        model(ids, decoder_input_ids=ids, cu_seq_lens_q=torch.tensor([0, 3, 6]), use_cache=False)
    with pytest.raises(ValueError, match=r"the mask of the source has shape \(1, 1, 6, 6\)"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6).bool(), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="must hold 1 for real tokens and 0 for padding"):
        model(ids, attention_mask=torch.full((1, 6), 2), decoder_input_ids=ids)
    with pytest.raises(ValueError, match="the decoder has nothing to read"):
        model(ids)
    with pytest.raises(ValueError, match="a row for each row of the decoder"):
        model(ids, decoder_input_ids=ids.expand(2, -1))
    with pytest.raises(TypeError, match="no argument 'atention_mask'"):
        model(ids, decoder_input_ids=ids, atention_mask=ids)


@torch.no_grad()
def test_a_source_that_is_all_padding_adds_nothing() -> None:
    """A row without a key gives zeros, and no NaN, as everywhere."""
    model, ids = make_seq2seq("differential"), tokens(2, 5)
    mask = torch.tensor([[1] * 5, [0] * 5])
    assert bool(model(ids, attention_mask=mask, decoder_input_ids=ids).logits.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, False),
        ({"cross_position": "rope"}, True),
        ({"encoder": {"hidden_size": SOURCE_WIDTH, "layers": [{"attention": "softmax"}, {}]}}, True),
    ],
)
@torch.no_grad()
def test_a_source_and_its_mirror_image(changes: dict[str, Any], told: bool) -> None:
    """Exact collinear attention in every encoder layer is even in m − n, and attention without places sees no order."""
    model = make_seq2seq("collinear", dtype=torch.float64, **changes)
    source, target = tokens(2, 6), tokens(2, 4)
    ahead, back = (model(ids, decoder_input_ids=target).logits for ids in (source, source.flip(1)))
    assert (distance(ahead, back) > 1e-3) == told
    if not told:
        assert distance(ahead, back) < 1e-10


@torch.no_grad()
def test_weights_that_are_kept_elsewhere_are_brought_in() -> None:
    """Accelerate's offloading: every weight comes when its module is called, cached cross keys need none."""
    from accelerate import cpu_offload

    source, mask = padded_source()
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = make_seq2seq("differential_v2").generate(source, **arguments)
    model = make_seq2seq("differential_v2")
    cpu_offload(model, torch.device("cpu"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(model.generate(source, **arguments), expected)
