"""Fine-tune a trained model on a text of yours with LoRA, and keep the adapter alone.

    python examples/lora.py runs/demo/arms/diff-v1/seed-0/model notes.txt --out my-adapter

`clearhead evaluate my-adapter` then measures base and adapter together. It needs
`pip install 'clearhead[train,adapters]'`.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import clearhead.models  # noqa: F401  registers the family with the Auto classes


def fine_tune(
    model_dir: str, text: str, out: Path, *, rank: int = 8, steps: int = 100, length: int = 128
) -> float:
    """Train `rank`-wide adapters of the attention on rows of `text`; writes them to `out`, returns the last loss."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise ValueError(f"the text has {len(ids)} tokens, less than one row of {length}")
    adapted = get_peft_model(
        model,
        LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    adapted.print_trainable_parameters()
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(out / "training"),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    result = trainer.train()
    adapted.save_pretrained(str(out))
    return float(result.training_loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model directory")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    loss = fine_tune(given.model, given.text.read_text(encoding="utf-8"), given.out, steps=given.steps)
    print(f"mean loss {loss:.3f}; adapter: {given.out}")


if __name__ == "__main__":
    main()
