"""What tools and users hand to models without meaning it: the right numbers, or one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CompileConfig, DynamicCache, Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.models.cost import forward_flops_per_token
from tests.contracts.model_cases import VARIANTS, left_padded, make_model, tokens
from tests.contracts.support import distance

every_variant = pytest.mark.parametrize("name", VARIANTS)
NONE: dict[str, Any] = {"use_cache": False}


@every_variant
@torch.no_grad()
def test_documents_beside_a_mask_stay_apart(name: str) -> None:
    """Positions that restart among real tokens mean documents, whether or not a mask of ones is given."""
    model = make_model(name, dtype=torch.float64)
    ids, positions = tokens(2, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    expected = model(ids, position_ids=positions, **NONE).logits
    assert (
        distance(
            model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), **NONE).logits, expected
        )
        < 1e-10
    )
    alone = model(ids[:1, 3:], **NONE).logits
    assert distance(expected[:1, 3:], alone) < 1e-10
    # Beside padding, whose positions follow nothing either.
    padded = torch.cat((ids[:1, :2], ids[:1]), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    places = torch.tensor([[1, 1, 0, 1, 2, 0, 1, 2, 3]])
    found = model(padded, position_ids=places, attention_mask=mask, **NONE).logits[:, 2:]
    assert distance(found, expected[:1]) < 1e-10
    # Left padding alone is one document.
    rows = [tokens(1, 4, seed=1)[0], tokens(1, 7, seed=2)[0]]
    batch, real = left_padded(rows)
    given = (real.cumsum(-1) - 1).masked_fill(real == 0, 1)
    assert (
        distance(
            model(batch, attention_mask=real, position_ids=given, **NONE).logits[0, -4:],
            model(rows[0][None], **NONE).logits[0],
        )
        < 1e-10
    )


WRONG_MASKS = {
    "additive": torch.tensor([[0.0, 0.0, -3.4e38, -3.4e38, 0.0, 0.0]]),
    "halves": torch.tensor([[0.5] * 6]),
    "documents": torch.tensor([[1, 1, 1, 2, 2, 0]]),
    "all hidden, additive": torch.zeros(1, 6),
    "negative": torch.tensor([[1, 1, 1, 1, 1, -1]]),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_that_are_not_ones_and_zeros_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="must hold 1 for real tokens and 0 for padding"):
        make_model("differential")(tokens(1, 6), attention_mask=WRONG_MASKS[kind])


@torch.no_grad()
def test_alibi_counts_positions_under_a_mask_of_four_dimensions() -> None:
    """Two endings of one row over a shared beginning, as tree decoding asks for."""
    model = make_model("differential", position="alibi", dtype=torch.float64)
    stem, one, two = (tokens(1, n, seed=n)[0] for n in (4, 2, 3))
    row = torch.cat((stem, one, two))[None]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    seen[6:, 4:6] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5, 6]])
    for mask in (seen, torch.zeros(9, 9, dtype=torch.float64).masked_fill(~seen, -1e300)):
        found = model(row, attention_mask=mask[None, None], position_ids=positions, **NONE).logits[0]
        assert distance(found[:6], model(torch.cat((stem, one))[None], **NONE).logits[0]) < 1e-10
        assert distance(found[6:], model(torch.cat((stem, two))[None], **NONE).logits[0, 4:]) < 1e-10


def test_a_mask_of_integers_in_four_dimensions_is_named() -> None:
    with pytest.raises(ValueError, match="attention_mask of 4 dimensions must be bool"):
        make_model("softmax")(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3).long())


@every_variant
def test_layers_on_the_disk_compute_what_they_do_in_memory(name: str, tmp_path: Path) -> None:
    model = make_model(name, num_hidden_layers=2).eval()
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.positions": "cpu", "lm_head": "cpu"}
    off = ClearheadForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off")
    )
    ids = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(off(ids).logits, model(ids).logits)
    assert off.lambdas() == model.lambdas()


@every_variant
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_layers_on_another_device_get_what_they_are_handed_there(name: str, position: str) -> None:
    """One device to spare there is here, meta; the hook is the one that Accelerate puts on a model it splits."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if position == "alibi" and "collinear" in name:
        pytest.skip("collinear attention is a function of rotary angles")
    model = make_model(name, position=position)
    model.set_attn_implementation("eager")
    for part in (model.model.layers[1], model.model.norm, model.lm_head):
        part.to("meta")
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta"))
    for mask in (None, torch.tensor([[0, 1, 1, 1], [1] * 4])):
        assert model(tokens(2, 4), attention_mask=mask, **NONE).logits.is_meta


@every_variant
def test_float64_and_empty_memory_have_exact_angles(name: str, tmp_path: Path) -> None:
    model = make_model(name, dtype=torch.float64)
    ids = tokens(1, 60)
    model.save_pretrained(tmp_path)
    loaded = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.device("meta"):
        empty = ClearheadForCausalLM(model.config)
    assert empty(ids.to("meta")).logits.is_meta
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        assert distance(loaded(ids).logits, expected) < 1e-11
        assert distance(empty(ids).logits, expected) < 1e-11


def test_label_smoothing_shifts_the_target(tmp_path: Path) -> None:
    model, ids = make_model("differential").eval(), tokens(2, 9)
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["clearhead"] == "ClearheadForCausalLM"
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    with torch.no_grad():
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
        logs = model(ids).logits[:, :-1].log_softmax(-1)
    right = -(0.9 * logs.gather(-1, ids[:, 1:, None])[..., 0] + 0.1 * logs.mean(-1)).mean()
    assert abs(float(found - right)) < 1e-5


def test_forward_takes_what_every_model_of_transformers_does() -> None:
    model, ids = make_model("differential"), tokens(1, 6)
    shifted = torch.roll(ids, -1, 1)
    shifted[:, -1] = -100
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids).loss, model(ids, labels=ids, shift_labels=shifted).loss)
        packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), **NONE).logits
        bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
        flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 3, "max_length_k": 3}
        found = model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), **flash, **NONE).logits
        assert torch.equal(found, packed)
    with pytest.raises(
        TypeError, match="forward has no argument 'atention_mask': did you mean 'attention_mask'"
    ):
        model(ids, atention_mask=torch.ones_like(ids))


def test_segments_of_bert_s_tokenizers_are_taken_where_they_say_nothing() -> None:
    model, ids = make_model("differential"), tokens(1, 6)
    with torch.no_grad():
        zeros = torch.zeros_like(ids)
        assert torch.equal(model(ids, token_type_ids=zeros, **NONE).logits, model(ids, **NONE).logits)
        zeros[:, 3:] = 1
        with pytest.raises(ValueError, match="token_type_ids tell two texts apart"):
            model(ids, token_type_ids=zeros)


def test_continuous_batching_is_refused_and_not_empty() -> None:
    """Where it is not possible; where it is: tests/load."""
    model = make_model("differential")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"generate_batch .*: attention 'differential' hands a server"):
        model.generate_batch([[5, 6, 7]])


@torch.no_grad()
def test_padding_on_the_right_of_a_prompt() -> None:
    """A compact cache counts from the mask and goes on, as a plain one does."""
    model = make_model("collinear", compact_cache=True, pad_token_id=0)
    ids, mask = torch.tensor([[5, 6, 7, 0, 0], [4, 5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    options = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **options)[:, 5:]
    for row, real in ((0, 3), (1, 5)):
        assert torch.equal(found[row], model.generate(ids[row : row + 1, :real], **options)[0, real:])


def test_prefix_tuning_is_refused_where_the_cache_is_laid_out_otherwise() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model("differential"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match="PEFT's prefix tuning"):
        model(tokens(1, 4))


@pytest.mark.parametrize("position", ["alibi", "nope"])
def test_a_scaling_that_nothing_would_look_at_is_refused(position: str) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(StrictDataclassError, match="turns nothing that could be scaled"):
        ClearheadConfig(position=position, rope_parameters=scaling)
    ClearheadConfig(position="rope", nope_interval=2, rope_parameters=scaling)


@every_variant
def test_maps_are_on_the_way_to_the_logits(name: str) -> None:
    model, ids = make_model(name), tokens(1, 5)
    out = model(ids, output_attentions=True)
    for maps in out.attentions:
        maps.retain_grad()
    out.logits.square().sum().backward()
    assert all(maps.grad is not None and float(maps.grad.abs().sum()) > 0 for maps in out.attentions)
    assert distance(out.logits, model(ids).logits) < 1e-4


def test_one_graph_a_request_with_a_cache_of_fixed_size() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = make_model("differential", pad_token_id=0), tokens(2, 7)
    once = CompileConfig(fullgraph=True, dynamic=False)
    once._compile_all_devices, once.backend = True, "eager"
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    model.generate(ids, cache_implementation="static", compile_config=once, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_lambda_projection_costs_something() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    v2, twin = (
        forward_flops_per_token(ClearheadConfig(attention=a, **sizes), 1)
        for a in ("differential_v2", "softmax")
    )  # type: ignore[arg-type]
    # Queries twice as wide, λ of four heads, and twice the logits and weighted values of one key.
    assert v2 - twin == 2 * (32 * 32 + 32 * 4 + 4 * (8 + 8))


def test_tracing_is_refused() -> None:
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match=r"export with torch\.export"):
        torch.jit.trace(make_model("differential"), (ids, torch.ones_like(ids)))


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_an_exported_model_takes_any_length(position: str) -> None:
    """Under an engine named for it, across the length at which "auto" would take another."""
    model = make_model("differential", position=position).eval()
    model.set_attn_implementation("sdpa")
    model.config.use_cache = model.config.return_dict = False
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(model, (tokens(1, 9),), dynamic_shapes=({1: length},)).module()
    for size in (2, 33, 64):
        with torch.no_grad():
            expected = model(tokens(1, size))
        found = exported(tokens(1, size))
        first = found[0] if isinstance(found, tuple) else found.logits
        assert distance(first, expected[0] if isinstance(expected, tuple) else expected.logits) < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_a_conversation_is_turned_by_one_length(kind: str) -> None:
    """The cache of one `generate` handed to the next, past the trained length, equals a full forward pass."""
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0] * 2,
            "long_factor": [3.0] * 2,
            "original_max_position_embeddings": 8,
        }
    model = make_model("differential", max_position_embeddings=8, rope_parameters=rope, dtype=torch.float64)
    said: Tensor = tokens(1, 5)
    cache, whole = DynamicCache(), 24
    for turn in range(3):
        said = model.generate(
            said, past_key_values=cache, rope_length=whole, max_new_tokens=3, do_sample=False
        )
        expected = model(said[:, :-1], rope_length=whole, **NONE).logits[:, -1].argmax(-1)
        assert torch.equal(said[:, -1], expected)
        said = torch.cat((said, tokens(1, 2, seed=turn)), 1)
    with pytest.raises(ValueError, match="rope_length"):
        model.generate(said, past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"position_ids": torch.tensor([[0.0, 1, 2, 3]])}, "position_ids must hold integers"),
        ({"rope_length": 8.5}, "rope_length"),
        ({"rope_length": 3}, "rope_length"),
        ({"rope_length": True}, "rope_length"),
    ],
)
def test_positions_and_lengths_are_whole_numbers(changes: dict[str, Any], sentence: str) -> None:
    model = make_model(
        "softmax", rope_parameters={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=8
    )
    with pytest.raises(ValueError, match=sentence):
        model(tokens(1, 4), **changes)


def test_a_config_written_by_hand_is_read(tmp_path: Path) -> None:
    """What earlier versions wrote is read: the names of weights and keys have not changed."""
    model = make_model("differential")
    model.save_pretrained(tmp_path)
    names = set(model.state_dict())
    assert {"model.layers.0.self_attn.variant.lambda_q1", "model.layers.0.self_attn.q_proj.weight"} <= names
    assert not {name for name in names if "positions" in name}
    assert json.loads((tmp_path / "config.json").read_text())["attention"] == "differential"
