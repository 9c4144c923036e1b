"""Encoder-decoders in Hugging Face's own training: collator, Seq2SeqTrainer, label smoothing, predictions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.model_cases import VOCABULARY
from tests.contracts.seq2seq_cases import PAD, START, make_seq2seq
from tests.evals import tiny
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

END = 2


def pairs(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Sources of 3 to 6 tokens whose target is the source itself, then the end."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 7, (1,), generator=rng))
        row = torch.randint(3, VOCABULARY, (length,), generator=rng).tolist()
        rows.append({"input_ids": row, "attention_mask": [1] * length, "labels": [*row, END]})
    return rows


def make_trainer(folder: Path, name: str = "differential", **settings: Any) -> Seq2SeqTrainer:
    model = make_seq2seq(name, eos_token_id=END).train()
    words = tiny.tokenizer()
    # The collator pads labels on the tokenizer's side: on the left there would be padding behind the start token.
    words.pad_token_id, words.padding_side = PAD, "right"
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        **({"max_steps": 12, "per_device_train_batch_size": 4} | settings),
    )
    return Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs(16, 0),
        eval_dataset=pairs(5, 1),
        data_collator=DataCollatorForSeq2Seq(words, model=model),
    )


def test_the_collator_s_decoder_input_is_the_model_s_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator(pairs(3, 0))
    labels = torch.as_tensor(batch["labels"])
    expected = trainer.model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(torch.as_tensor(batch["decoder_input_ids"]), expected)
    assert bool((expected[:, 0] == START).all()) and bool((labels == -100).any())


@pytest.mark.parametrize("name", ["differential", "differential_v2_collinear"])
def test_it_trains_evaluates_and_predicts_with_generate(name: str, tmp_path: Path) -> None:
    settings = {"predict_with_generate": True, "generation_max_length": 7, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, name, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] > 0
    found = trainer.predict(pairs(5, 1), num_beams=2)
    assert found.predictions.shape[0] == 5 and (found.predictions[:, 0] == START).all()


def test_smoothed_labels_are_not_shifted_again(tmp_path: Path) -> None:
    """Trainer shifts for the causal models in its table; here the decoder's input is shifted and labels are not."""
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.2)
    batch = {key: torch.as_tensor(value) for key, value in trainer.data_collator(pairs(4, 0)).items()}
    labels = batch["labels"].clone()
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    assert abs(float(found) - float(expected)) < 1e-5


def test_accumulated_steps_are_one_large_step(tmp_path: Path) -> None:
    """The loss divides by all labels of a step, not by those of its part."""
    weights = []
    for size, parts in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        trainer = make_trainer(tmp_path, **settings, optim="sgd")
        # One step of all rows, so that their order is nothing.
        trainer.train_dataset = pairs(8, 0)
        trainer.train()
        weights.append(trainer.model.lm_head.weight.detach().clone())
    assert float((weights[0] - weights[1]).abs().max()) < 1e-5
