"""What clients of Hugging Face's models do, with one of ours."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, GenerationConfig

from clearhead.models import ClearheadForCausalLM
from clearhead.train import trainer
from tests.contracts.model_cases import VARIANTS, make_model, tokens
from tests.contracts.support import distance
from tests.evals import tiny
from tests.train import small


@torch.no_grad()
def test_generate_is_handed_a_tokenizer() -> None:
    """`transformers serve` always does; stop strings need one."""
    model, words = tiny.ours(attention="differential"), tiny.tokenizer()
    ids = words("The grass", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, tokenizer=words), plain)
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, plain[:, ids.shape[1] :])
    new = plain[0, ids.shape[1] :].tolist()
    place = next(index for index, token in enumerate(new) if words.decode([token]).isalpha() and token < 128)
    stop = {"tokenizer": words, "stop_strings": [words.decode([new[place]])]}
    stopped = model.generate(ids, max_new_tokens=6, do_sample=False, **stop)
    assert torch.equal(stopped, plain[:, : ids.shape[1] + place + 1])


PEFT = {"LoraConfig": {"q_proj", "v_proj"}, "IA3Config": {"k_proj", "v_proj", "down_proj"}}


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2", "collinear"])
def test_peft_has_default_target_modules(kind: str, name: str) -> None:
    """LLaMA's: they carry the same names and the same part of the work."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(name), getattr(peft, kind)(task_type="CAUSAL_LM"))
    tuned = {key.rsplit(".", 1)[-1] for key in model.targeted_module_names}
    assert tuned == PEFT[kind]
    model(input_ids=tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora_" in n or "ia3_" in n)


def test_peft_imported_after_the_models_knows_them_too() -> None:
    """PEFT reads `to_dict` before it looks for a default, which is when it is told."""
    peft = pytest.importorskip("peft")
    from peft.utils import constants

    for table in (
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    ):
        table.pop("clearhead", None)
    model = peft.get_peft_model(make_model("softmax"), peft.IA3Config(task_type="CAUSAL_LM"))
    assert any(name.endswith("down_proj") for name in model.targeted_module_names)
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["clearhead"] == ["down_proj"]


@pytest.mark.parametrize(
    ("name", "compact"),
    [(name, compact) for name in VARIANTS for compact in (False, True) if "collinear" in name or not compact],
)
@torch.no_grad()
def test_what_a_layer_holds_is_said_before_it_does(name: str, compact: bool) -> None:
    """Tools that make a cache before the first call read `per_layer_config`."""
    model, cache = make_model(name, compact_cache=compact), DynamicCache()
    model(tokens(1, 3), past_key_values=cache)
    assert len(model.config.per_layer_config) == len(cache.layers)
    for said, layer in zip(model.config.per_layer_config, cache.layers, strict=True):
        keys, values = layer.keys.shape, layer.values.shape
        assert (said.num_key_value_heads, said.head_dim) == (keys[1], keys[3])
        widths = (keys[3], values[3])
        assert widths == (
            getattr(said, "qk_head_dim", said.head_dim),
            getattr(said, "v_head_dim", said.head_dim),
        )
    # The configuration itself still counts as the Transformer twin.
    assert (model.config.num_key_value_heads, model.config.head_dim) == (4, 4)
    assert "qk_head_dim" not in model.config.to_dict()


@pytest.mark.parametrize("name", ["differential", "differential_v2", "differential_collinear"])
def test_a_prompt_in_pieces_into_a_cache_made_beforehand(name: str) -> None:
    model, ids = make_model(name), tokens(2, 9)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **options)
    found = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **options)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_decoding_step_is_exported() -> None:
    """As for ExecuTorch: one token into a cache of fixed size that the program owns."""
    from transformers.integrations.executorch import convert_and_export_with_cache

    model, ids = make_model("differential", num_hidden_layers=1), tokens(1, 6)
    model.set_attn_implementation("sdpa")
    cache = {"batch_size": 1, "max_cache_len": 8}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config=cache
    )
    step = convert_and_export_with_cache(
        model, example_input_ids=ids[:, :1], example_cache_position=torch.tensor([0]), strict=False
    ).module()
    expected = make_model("differential", num_hidden_layers=1)(ids).logits
    for place in range(6):
        found = step(input_ids=ids[:, place : place + 1], cache_position=torch.tensor([place]))
        assert distance(found[:, 0], expected[:, place]) < 1e-4


def test_layers_that_differ_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match="not per_layer_config"):
        make_model("softmax", per_layer_config={0: {"intermediate_size": 64}})


def test_one_dtype_for_tools_that_want_one(tmp_path: Path) -> None:
    """FSDP2 shards parameters of one dtype: λ, which loading keeps in float32, follows `to`."""
    make_model("differential").save_pretrained(tmp_path)
    model = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens(1, 5), labels=tokens(1, 5)).loss.isfinite()
    assert make_model("differential_v2")._keep_in_fp32_modules_strict == set()


def test_layers_that_a_file_has_not_are_an_error_or_told(tmp_path: Path) -> None:
    """Hugging Face would start them at random with a warning; who asks for the loading information is told by it."""
    make_model("softmax").save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it has no model.layers.0"):
        ClearheadForCausalLM.from_pretrained(tmp_path)
    _, told = ClearheadForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == set(make_model("softmax").state_dict())
    with pytest.raises(ValueError, match=r"it has no model.layers.0"):
        ClearheadForCausalLM.from_pretrained(tmp_path)


def test_a_run_writes_down_the_length_it_trained_with(tmp_path: Path) -> None:
    recipe = small.recipe(small.write_corpus(tmp_path / "texts"))
    job = recipe.for_arm("V1", 0)
    data: Any = SimpleNamespace(tokenizer=tiny.tokenizer())
    assert trainer.build_model(job, data).config.max_position_embeddings == job.data.length == 32
    told = job.model_copy(update={"model": {**job.model, "max_position_embeddings": 64}})
    assert trainer.build_model(told, data).config.max_position_embeddings == 64
