"""What clients of Hugging Face's models do, with one of ours."""

import pytest
import torch

from tests.contracts.model_cases import make_model, tokens
from tests.evals import tiny


@torch.no_grad()
def test_generate_is_handed_a_tokenizer() -> None:
    """`transformers serve` always does; stop strings need one."""
    model, words = tiny.ours(attention="differential"), tiny.tokenizer()
    ids = words("The grass", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, tokenizer=words), plain)
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
