"""The model against the oracle decoder, and everything a Hugging Face causal language model is expected to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from clearhead import registry
from clearhead.models import ClearheadForCausalLM
from tests.contracts.flash import stand_in
from tests.contracts.model_cases import (
    LAYERS,
    LAYOUTS,
    VARIANTS,
    VOCABULARY,
    layout_of,
    left_padded,
    make_config,
    make_model,
    oracle_of,
    tokens,
)
from tests.contracts.support import assert_within, distance, relative_error

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def test_no_variant_of_the_registry_is_left_out() -> None:
    assert {attention for attention, _ in VARIANTS.values()} == set(registry.VARIANTS)


@every_layout
@every_variant
def test_logits_and_effective_maps_are_the_oracle_s(name: str, layout: str) -> None:
    model, ids = make_model(name, layout, torch.float64), tokens(2, 7)
    expected, maps = oracle_of(name, layout, model, ids)
    assert distance(model(ids).logits, expected) < 1e-10
    model.set_attn_implementation("eager")
    found = model(ids, output_attentions=True)
    assert distance(found.logits, expected) < 1e-10
    assert len(found.attentions) == LAYERS
    assert max(distance(a, b) for a, b in zip(found.attentions, maps, strict=True)) < 1e-10


@every_variant
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model, row = make_model(name, dtype=torch.float64), tokens(1, 5, seed=3)
    alone, _ = oracle_of(name, "gqa", model, row)
    padded = torch.cat((row.new_zeros(1, 2), row, row.new_zeros(1, 1)), dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    assert distance(model(padded, attention_mask=mask).logits[:, 2:7], alone) < 1e-10


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_variant
def test_packed_documents_are_separate(name: str, implementation: str) -> None:
    model = make_model(name, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    parts = [tokens(2, length, seed=length) for length in (3, 1, 4)]
    position_ids = torch.cat([torch.arange(part.shape[1]) for part in parts]).expand(2, -1)
    expected = torch.cat([oracle_of(name, "gqa", model, part)[0] for part in parts], dim=1)
    packed = torch.cat(parts, dim=1)
    for use_cache in (False, None):
        found = model(packed, position_ids=position_ids, use_cache=use_cache).logits
        assert distance(found, expected) < 1e-10
    rows_differ = position_ids.clone()
    rows_differ[1] = torch.arange(8)
    found = model(packed, position_ids=rows_differ, use_cache=False).logits
    assert distance(found[0], expected[0]) < 1e-10
    assert distance(found[1], model(packed[1:]).logits[0]) < 1e-10


@every_variant
def test_shift_invariance(name: str) -> None:
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model, ids = make_model(name, dtype=dtype), tokens(2, 6)
        here = torch.arange(6)[None]
        near, far = (model(ids, position_ids=p).logits for p in (here, here + 1000))
        assert distance(near, far) > 1e-2 if name.endswith("slack") else distance(near, far) < bound


@every_layout
def test_parameters_equal_the_twin_s(layout: str) -> None:
    def count(name: str, **changes: Any) -> int:
        return sum(p.numel() for p in make_model(name, layout, **changes).parameters())

    heads, head_dim, width = LAYOUTS[layout][0], 8, 16
    sizes = {
        "hidden_size": width,
        "head_dim": head_dim,
        "num_key_value_heads": layout_of("differential", layout)[1],
    }
    twin = count("softmax", **sizes)
    assert count("differential", **sizes) - twin == LAYERS * 6 * head_dim
    assert count("differential_v2", **sizes) - twin == LAYERS * (heads * head_dim * width + heads * width)
    for name in ("collinear", "collinear_slack", "collinear_strict"):
        assert count(name, **sizes) == twin
    for parent in ("differential", "differential_v2"):
        assert count(f"{parent}_collinear", **sizes) == count(parent, **sizes)


def test_loss_is_the_mean_over_labelled_next_tokens() -> None:
    model, ids = make_model("differential"), tokens(2, 7)
    labels = ids.clone()
    labels[0, :3] = -100
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert distance(model(ids, labels=labels).loss, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@every_variant
def test_low_precision_is_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    model, ids = make_model(name, initializer_range=0.1).to(dtype), tokens(2, 7)
    expected, _ = oracle_of(name, "gqa", model, ids)
    found = model(ids).logits
    assert found.dtype == dtype
    model.set_attn_implementation("eager")
    plain = model(ids).logits
    assert_within([found], [expected], [plain], dtype)
    assert relative_error([plain], [expected]) < 20 * torch.finfo(dtype).eps


@every_variant
def test_autocast_is_near_full_precision(name: str) -> None:
    model, ids = make_model(name, initializer_range=0.1).train(), tokens(2, 7)
    exact = model(ids, labels=ids)
    exact.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids)
    rough.loss.backward()
    assert distance(rough.loss, exact.loss) < 0.02 * exact.loss.item()
    found = [p.grad for p in model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)
    # The largest gradient by norm, to within bfloat16's few digits.
    index = max(range(len(gradients)), key=lambda i: float(gradients[i].norm()))
    assert float((found[index] - gradients[index]).norm()) < 0.1 * float(gradients[index].norm())


@every_variant
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    ids = tokens(2, 7)
    results = []
    for checkpointed in (False, True):
        model = make_model(name).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    assert all(g is not None for g in results[0].values())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@every_variant
def test_compiles_as_one_graph_forward_and_backward(name: str) -> None:
    """`fullgraph` raises at the first break; aot_eager traces both directions without generating code."""
    torch._dynamo.reset()
    model, ids = make_model(name, num_hidden_layers=1).train(), tokens(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, labels=ids)
    expected_gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    found = compiled(input_ids=ids, labels=ids)
    gradients = torch.autograd.grad(found.loss, list(model.parameters()))
    assert distance(found.logits, expected.logits) < 1e-5
    assert max(distance(a, b) for a, b in zip(gradients, expected_gradients, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("name", ["differential", "differential_v2"])
def test_compiles_as_one_graph_with_masks(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, ids = make_model(name, num_hidden_layers=1), tokens(2, 6)
    masks = {
        "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])},
        "packed": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), "use_cache": False},
    }
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, **masks[kind]).logits
        expected = model(ids, **masks[kind]).logits
    real = masks["padded"]["attention_mask"][..., None] if kind == "padded" else 1
    assert distance(found * real, expected * real) < 1e-5


@pytest.mark.compiles
def test_inductor_compiles_and_agrees() -> None:
    torch._dynamo.reset()
    model, ids = make_model("differential", num_hidden_layers=1), tokens(2, 6)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(input_ids=ids, use_cache=False).logits
        assert distance(found, model(ids).logits) < 1e-5


@pytest.mark.parametrize("layout", ["mha", "gqa"])
@every_variant
def test_save_and_load_through_the_auto_classes(name: str, layout: str, tmp_path: Path) -> None:
    model, ids = make_model(name, layout, tie_word_embeddings=layout == "gqa"), tokens(2, 7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, ClearheadForCausalLM)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.attention, config.attention_options) == VARIANTS[name]
    differing = {key for key, value in config.to_dict().items() if value != model.config.to_dict()[key]}
    assert differing <= {"_name_or_path", "dtype"}


def test_lambda_vectors_stay_in_float32_when_a_checkpoint_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    make_model("differential").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in loaded.named_parameters():
        vector = "lambda_q" in key or "lambda_k" in key
        assert parameter.dtype == (torch.float32 if vector else torch.bfloat16), key
    assert loaded(tokens(2, 7)).logits.dtype == torch.bfloat16


@every_variant
def test_attention_implementations_agree(name: str) -> None:
    model, ids = make_model(name), tokens(2, 7)
    logits: dict[str, Tensor] = {}
    for implementation in ("clearhead", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(ids).logits
    assert max(distance(logits["eager"], logits[other]) for other in ("clearhead", "sdpa")) < 1e-5


@pytest.mark.compiles
def test_flex_attention_agrees_on_padding() -> None:
    model, ids = make_model("differential", num_hidden_layers=1), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        found = model(ids, attention_mask=mask).logits
    assert distance(found * mask[..., None], expected * mask[..., None]) < 1e-5


def test_an_implementation_that_cannot_do_it_says_why() -> None:
    model, ids = make_model("differential"), tokens(2, 6)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="maps"):
        model(ids, output_attentions=True)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="backward"):
        model(ids)


@every_variant
def test_flash_attention_2_reaches_the_kernel_as_it_must(name: str) -> None:
    """Under Hugging Face's dispatch with a stand-in for the CUDA kernel: whole batches, left padding, packed rows."""
    model = make_model(name, dtype=torch.float64)
    ids, mask = left_padded([tokens(1, 4, seed=1)[0], tokens(1, 7, seed=2)[0]])
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    ways = ({}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False})
    with torch.no_grad():
        expected = [model(ids, **way).logits for way in ways]
        model.config._attn_implementation = "flash_attention_2"
        with stand_in() as recorder:
            found = [model(ids, **way).logits for way in ways]
    assert distance(found[0], expected[0]) < 1e-10
    assert distance(found[1] * mask[..., None], expected[1] * mask[..., None]) < 1e-10
    assert distance(found[2], expected[2]) < 1e-10
    calls = {"differential": 4, "differential_collinear": 4, "diff_lora": 2}.get(VARIANTS[name][0], 1)
    assert len(recorder.calls) == len(ways) * LAYERS * calls


@every_variant
def test_lora_on_the_projections_trains(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    base, ids = make_model(name, initializer_range=0.1), tokens(4, 12)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == LAYERS * len(targets) * 2
    assert all("lora_" in key for key in trainable)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())


def test_initialisation_is_the_papers() -> None:
    """λ vectors N(0, 0.1), norm weights one, projections N(0, initializer_range)."""
    torch.manual_seed(0)
    config = make_config("differential", hidden_size=64, num_hidden_layers=24, initializer_range=0.02)
    state = ClearheadForCausalLM(config).state_dict()
    vectors = torch.cat([value for key, value in state.items() if ".lambda_" in key])
    assert abs(float(vectors.std()) - 0.1) < 0.02
    assert all(bool((value == 1).all()) for key, value in state.items() if "norm" in key)
    for key, value in state.items():
        if key.endswith("_proj.weight"):
            assert abs(float(value.std()) - 0.02) < 0.004, key


def test_lambdas_are_those_of_equation_2() -> None:
    from tests.oracles.differential import lambda_init, lambda_value

    model = make_model("differential")
    for index, found in model.lambdas().items():
        vectors = [
            model.state_dict()[f"model.layers.{index}.self_attn.variant.lambda_{n}"]
            for n in ("q1", "k1", "q2", "k2")
        ]
        assert abs(found - float(lambda_value(*vectors, lambda_init(index)))) < 1e-6
    assert sorted(model.lambdas()) == list(range(LAYERS))
    gates = make_model("differential_v2").lambdas(tokens(2, 5))
    assert sorted(gates) == list(range(LAYERS))
    assert all(0 < value < 1 for value in gates.values())
    assert make_model("softmax").lambdas() == make_model("collinear").lambdas() == {}


@pytest.mark.parametrize(
    "changes", [{"attention_mask": torch.ones(2, 9)}, {"attention_mask": torch.ones(2, 4)}]
)
def test_a_mask_of_the_wrong_length_is_an_error(changes: dict[str, Tensor]) -> None:
    model = make_model("softmax")
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(2, 6), **changes)


def test_vocabulary_is_the_one_asked_for() -> None:
    assert make_model("softmax")(tokens(1, 3)).logits.shape == (1, 3, VOCABULARY)


def test_the_embedding_may_start_larger_than_the_rest() -> None:
    from clearhead.models import ClearheadConfig, ClearheadForCausalLM

    sizes = {
        "vocab_size": 500,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    model = ClearheadForCausalLM(
        ClearheadConfig(**sizes, initializer_range=0.1, embedding_initializer_range=0.5)
    )
    embedding = model.model.embed_tokens.weight
    assert (embedding[0] == 0).all(), "the padding row stays zero"
    assert abs(float(embedding[1:].std()) - 0.5) < 0.02
    assert abs(float(model.lm_head.weight.std()) - 0.1) < 0.005
