"""Encoders in the hands of tools: saving and loading, engines, PEFT, offloading, Trainer, servers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from clearhead.models import (
    ClearheadEncoderConfig,
    ClearheadEncoderForSequenceClassification,
    ClearheadEncoderModel,
    ClearheadForMaskedLM,
)
from clearhead.models.cost import forward_flops_per_token, kv_bytes, mean_visible, parameters
from clearhead.nn import Attention
from tests.contracts.encoder_cases import (
    make_encoder,
    oracle_head,
    oracle_states,
    weights_of,
)
from tests.contracts.flash import stand_in
from tests.contracts.model_cases import LAYERS, VARIANTS, tokens
from tests.contracts.support import distance

every_variant = pytest.mark.parametrize("name", VARIANTS)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("tied", [True, False])
@every_variant
def test_save_and_load_through_the_auto_classes(name: str, tied: bool, tmp_path: Path) -> None:
    model, ids = make_encoder(name, tie_word_embeddings=tied), tokens(2, 7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is ClearheadForMaskedLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ClearheadEncoderModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ClearheadEncoderConfig
    assert (config.attention, config.attention_options) == VARIANTS[name]
    differing = {key for key, value in config.to_dict().items() if value != model.config.to_dict()[key]}
    assert differing <= {"_name_or_path", "dtype"}


def test_lambda_vectors_stay_in_float32_when_a_checkpoint_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    make_encoder("differential").save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in loaded.named_parameters():
        vector = "lambda_q" in key or "lambda_k" in key
        assert parameter.dtype == (torch.float32 if vector else torch.bfloat16), key
    assert loaded(tokens(2, 7)).logits.dtype == torch.bfloat16


@every_variant
def test_attention_implementations_agree(name: str) -> None:
    model, ids = make_encoder(name), tokens(2, 6)
    logits: dict[str, Tensor] = {}
    for implementation in ("clearhead", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(ids, attention_mask=PADDED).logits * PADDED[..., None]
    assert max(distance(logits["eager"], logits[other]) for other in ("clearhead", "sdpa")) < 1e-5
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="maps"):
        model(ids, output_attentions=True)


@every_variant
def test_the_cpu_kernel_by_name(name: str) -> None:
    from clearhead.kernels.cpu import library

    if library.missing() is not None:
        pytest.skip("the CPU kernel is not built here")
    model, ids = make_encoder(name, initializer_range=0.1, sliding_window=4), tokens(2, 6)
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=PADDED).logits
    model.set_attn_implementation("cpu")
    found = model(ids, attention_mask=PADDED).logits
    assert distance(found * PADDED[..., None], expected * PADDED[..., None]) < 1e-5


@every_variant
def test_flash_attention_2_reaches_the_kernel_as_it_must(name: str) -> None:
    """Under Hugging Face's dispatch with a stand-in for the CUDA kernel: whole batches, padding, packed rows."""
    model, ids = make_encoder(name, dtype=torch.float64, sliding_window=3), tokens(2, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    # Two documents in the first row's real tokens.
    both = {"attention_mask": PADDED, "position_ids": torch.tensor([[0, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]])}
    ways: tuple[dict[str, Tensor], ...] = ({}, {"attention_mask": PADDED}, {"position_ids": packed}, both)
    with torch.no_grad():
        expected = [model(ids, **way).logits for way in ways]
        model.config._attn_implementation = "flash_attention_2"
        with stand_in() as recorder:
            found = [model(ids, **way).logits for way in ways]
    for way, a, b in zip(ways, found, expected, strict=True):
        real = PADDED[..., None] if "attention_mask" in way else 1
        assert distance(a * real, b * real) < 1e-10
    calls = {"differential": 4, "differential_collinear": 4, "diff_lora": 2}.get(VARIANTS[name][0], 1)
    assert len(recorder.calls) == len(ways) * LAYERS * calls


def test_documents_in_pieces_are_not_told_by_lengths() -> None:
    model, ids = make_encoder("softmax", dtype=torch.float64), tokens(1, 6)
    layer = Attention(32, 4, backend="flash_attention_2").double()
    model.config._attn_implementation = "flash_attention_2"
    with stand_in():
        with pytest.raises(ValueError, match="each must lie in one piece"):
            model(ids, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))
        with pytest.raises(ValueError, match="each must lie in one piece"):
            layer(torch.zeros(1, 4, 32).double(), documents=torch.tensor([[1, 2, 2, 1]]))


@every_variant
def test_lora_on_the_projections_trains(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    base, ids = make_encoder(name, initializer_range=0.1), tokens(4, 12)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    # The family's default targets: those of LLaMA, whose names it shares.
    assert base.config.to_dict()["model_type"] == "clearhead_encoder"
    model = get_peft_model(base, LoraConfig(r=4))
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == LAYERS * 2 * 2 and all("lora_" in key for key in trainable)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
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


@every_variant
def test_float64_and_empty_memory_have_exact_angles(name: str, tmp_path: Path) -> None:
    model = make_encoder(name, dtype=torch.float64)
    ids = tokens(1, 60)
    model.save_pretrained(tmp_path)
    loaded = ClearheadForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.device("meta"):
        empty = ClearheadForMaskedLM(model.config)
    assert empty(ids.to("meta")).logits.is_meta
    empty = empty.to_empty(device="cpu").double()
    empty.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        assert distance(loaded(ids).logits, expected) < 1e-11
        assert distance(empty(ids).logits, expected) < 1e-11


@every_variant
def test_layers_on_the_disk_compute_what_they_do_in_memory(name: str, tmp_path: Path) -> None:
    model = make_encoder(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    here = ("model.embed_tokens", "model.embed_norm", "model.layers.0", "model.norm", "model.positions")
    places = dict.fromkeys((*here, "head", "lm_head"), "cpu") | {"model.layers.1": "disk"}
    off = ClearheadForMaskedLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off")
    )
    ids = tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(off(ids).logits, model(ids).logits)


@every_variant
def test_layers_on_another_device_get_what_they_are_handed_there(name: str) -> None:
    """One device to spare there is here, meta; the hook is the one that Accelerate puts on a model it splits."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = make_encoder(name, tie_word_embeddings=False)
    model.set_attn_implementation("eager")
    for part in (model.model.layers[1], model.model.norm, model.head, model.lm_head):
        part.to("meta")
        add_hook_to_module(part, AlignDevicesHook(execution_device="meta"))
    for given in ({}, {"attention_mask": PADDED}):
        assert model(tokens(2, 6), **given).logits.is_meta


@every_variant
def test_maps_are_on_the_way_to_the_logits(name: str) -> None:
    model, ids = make_encoder(name), tokens(1, 5)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for maps in out.attentions:
        maps.retain_grad()
    out.logits.square().sum().backward()
    assert all(maps.grad is not None and float(maps.grad.abs().sum()) > 0 for maps in out.attentions)
    assert distance(out.logits, model(ids).logits) < 1e-4


@every_variant
def test_padding_that_is_no_number_reaches_nothing(name: str) -> None:
    """Also not the mean that a head for whole texts reads."""
    model = make_encoder(name, head=ClearheadEncoderForSequenceClassification)
    states = torch.randn(2, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = model(inputs_embeds=states, attention_mask=PADDED).logits
    spoilt = states.masked_fill(PADDED[..., None] == 0, float("nan"))
    found = model(inputs_embeds=spoilt, attention_mask=PADDED).logits
    assert bool(found.isfinite().all()) and distance(found, expected) < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "first"])
@every_variant
def test_a_text_is_judged_by_its_real_tokens(name: str, pooling: str) -> None:
    model = make_encoder(
        name,
        dtype=torch.float64,
        head=ClearheadEncoderForSequenceClassification,
        num_labels=3,
        classifier_pooling=pooling,
    )
    ids, weights = tokens(2, 6), weights_of(model)
    found = model(ids, attention_mask=PADDED).logits
    for row, real, logits in zip(ids, PADDED.bool(), found, strict=True):
        states, _ = oracle_states(name, "gqa", model, weights, row[real][None])
        read = states.mean(1) if pooling == "mean" else states[:, 0]
        read = oracle_head(model, weights, read)
        expected = torch.einsum("bi,oi->bo", read, weights["classifier.weight"]) + weights["classifier.bias"]
        assert distance(logits, expected[0]) < 1e-10


def test_what_a_head_for_whole_texts_cannot_read_is_refused() -> None:
    model = make_encoder("softmax", head=ClearheadEncoderForSequenceClassification)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3, 6])}
    for given in (packed, bounds):
        with pytest.raises(ValueError, match="give a text a row"):
            model(tokens(1, 6), **given)
    with pytest.raises(ValueError, match="has 4 dimensions"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    model(tokens(1, 6), position_ids=torch.arange(6)[None])


def test_costs_count_both_sides() -> None:
    assert mean_visible(10, None, causal=False) == 10
    assert mean_visible(10, 3, causal=False) == (3 + 4 + 5 * 6 + 4 + 3) / 10
    assert mean_visible(4, 9, causal=False) == 4 and mean_visible(1, 2, causal=False) == 1
    small = {"hidden_size": 24, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = small | {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 11}
    config = ClearheadEncoderConfig(**sizes)
    matrices = 24 * 11 + 24 * 24 + 4 * 24 * 16 + 3 * 24 * 32
    assert forward_flops_per_token(config, 6) == 2 * (matrices + 2 * 6 * 2 * 8)
    assert parameters(config) == matrices + 11 + 4 * 24
    assert kv_bytes(config, 6, torch.float32) == 0


def test_trainer_trains_on_masked_tokens(tmp_path: Path) -> None:
    """With transformers' own collator; in a row of one repeated word what is masked can be read beside it."""
    from transformers import BertTokenizerFast

    words = [f"w{index}" for index in range(12)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    reader = BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=True)
    rows = [dict(reader(" ".join([words[index % 12]] * 6))) for index in range(48)]
    torch.manual_seed(0)
    model = make_encoder("differential", initializer_range=0.1, vocab_size=len(reader)).train()
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(reader, mlm_probability=0.3)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_a_server_runs_it_by_one_call_a_layer() -> None:
    """As vLLM and SGLang call encoders: texts side by side in one row, masks the server's own."""
    from transformers import AttentionInterface

    called: list[Any] = []

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **kept: Any
    ) -> tuple[Tensor, None]:
        called.append((module.layer_idx, module.is_causal, module.sliding_window))
        documents = kept["documents"]
        seen = documents[:, None] == documents[None]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        weights = (q @ k.mT * scaling).masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    model = make_encoder("collinear", dtype=torch.float64)
    row, positions = tokens(1, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    expected = model(row, position_ids=positions).logits
    AttentionInterface.register("both_sides", attend)
    try:
        model.config._attn_implementation = "both_sides"
        documents = torch.tensor([0, 0, 0, 1, 1, 1, 1])
        found = model(row, position_ids=positions, documents=documents).logits
    finally:
        AttentionInterface._global_mapping.pop("both_sides")
    assert distance(found, expected) < 1e-10
    assert called == [(layer, False, None) for layer in range(LAYERS)]
