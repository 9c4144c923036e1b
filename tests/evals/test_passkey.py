"""The passkey prompts word for word, and answers that neither batches nor caches nor padding can change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.retrieval.passkey import evaluation as passkey
from clearhead.evals.retrieval.passkey.evaluation import KeyReply, Passkey, PasskeyConfig, answers, published
from clearhead.evals.retrieval.passkey.prompts import FORMS, judge, passkey_prompt
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, copier

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
START = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
# Written out from the paper's listing 1 and from the released program, for the key 54321.
MIDDLE = {
    "coca": "\nThe passkey is 54321. Remeber it. 54321 is the passkey.\n",
    "mohtashami": "\nThe pass key is 54321. Remember it. 54321 is the pass key.\n",
}
END = {"coca": "\nWhat is the passkey?", "mohtashami": "\nWhat is the pass key? The pass key is"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [200, 331, 1024])
def test_a_prompt_is_the_published_text_in_exactly_so_many_tokens(form: str, length: int) -> None:
    words = tiny.tokenizer()
    starts = set()
    for seed in range(8):
        prompt = passkey_prompt(FORMS[form], words, length, np.random.default_rng(seed))
        assert len(prompt.ids) == length and prompt.ids[0] == words.bos_token_id
        text = words.decode(prompt.ids[1:].tolist())
        middle = MIDDLE[form].replace("54321", prompt.key)
        assert text.startswith(START) and text.endswith(END[form]) and text.count(middle) == 1
        before, after = text.removeprefix(START).removesuffix(END[form]).split(middle)
        fillers = " ".join([FILLER] * 30)
        assert fillers.startswith(before) and fillers.startswith(after)
        assert words.decode(prompt.ids[prompt.start :].tolist()).lstrip("\n").startswith(middle.strip())
        low, high = FORMS[form].keys
        assert low <= int(prompt.key) <= high
        starts.add(prompt.start)
    assert len(starts) > 4


def test_keys_are_those_of_the_programs() -> None:
    rng = np.random.default_rng(0)
    words = tiny.tokenizer()
    keys = [int(passkey_prompt(FORMS["coca"], words, 200, rng).key) for _ in range(50)]
    assert min(keys) >= 10_000 and max(keys) <= 99_999
    assert FORMS["coca"].chance == 1 / 90_000 and FORMS["mohtashami"].chance == 1 / 50_000
    assert (FORMS["coca"].new_tokens, FORMS["mohtashami"].new_tokens) == (64, 10)


def test_places_inside_and_outside_the_window() -> None:
    words = tiny.tokenizer()
    for seed in range(12):
        inside, outside = (
            passkey_prompt(FORMS["coca"], words, 512, np.random.default_rng(seed), window=256, inside=where)
            for where in (True, False)
        )
        assert inside.start >= 512 - 256 > outside.start
        assert len(inside.ids) == len(outside.ids) == 512


def test_inside_is_the_whole_sentence_within_the_last_training_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = KeyReply("", judge("", "1", ended=True))
    monkeypatch.setattr(passkey, "answers", lambda subject, prompts, new, size: [silent] * len(prompts))
    subject = tiny.subject(tiny.llama(), external=True, training_length=256)
    config = PasskeyConfig(forms=["coca"], lengths=[512], samples=60)
    (cell,) = Passkey().run(subject, config)["cells"]
    starts = [prompt.start for prompt in published(subject, config, FORMS["coca"], 512, "uniform", 256)]
    assert cell["inside"] == "".join("1" if start >= 512 - 256 else "0" for start in starts)
    assert 10 < cell["inside"].count("1") < 50


def test_what_does_not_fit_is_said_and_never_cut() -> None:
    with pytest.raises(ValueError, match=r"needs at least \d+ tokens, not 40"):
        passkey_prompt(FORMS["coca"], tiny.tokenizer(), 40, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no place of the key in 200 tokens is outside the last 200"):
        passkey_prompt(
            FORMS["coca"], tiny.tokenizer(), 200, np.random.default_rng(0), window=200, inside=False
        )


@pytest.mark.parametrize(
    ("text", "ended", "first", "anywhere"),
    [
        (" 54321.", False, True, True),
        (" 54321", False, None, True),  # the run may still grow
        (" 54321", True, True, True),
        (" 543210", True, False, True),
        (" is 12, or 54321", True, False, True),
        (" is 12, or", False, False, None),
        (" 054321 ", True, True, True),  # read as a number
        (" 5432", True, False, False),
        ("none", False, None, None),
        ("", True, False, False),
    ],
)
def test_the_two_rules(text: str, ended: bool, first: bool | None, anywhere: bool | None) -> None:
    verdict = judge(text, "54321", ended=ended)
    assert (verdict.first, verdict.anywhere) == (first, anywhere)


def test_a_model_that_copies_finds_every_key_and_stops_early() -> None:
    model = tiny.CopyModel(tiny.CopyConfig()).eval()
    config = PasskeyConfig(forms=["mohtashami"], lengths=[256, 512], samples=6, max_new_tokens=64)
    values = Passkey().run(tiny.subject(model, external=True, training_length=256), config)
    assert [cell["correct"] for cell in values["cells"]] == [
        {"first number": "111111", "substring": "111111"}
    ] * 2
    assert set(values["cells"][0]["inside"]) == {"1"} and "0" in values["cells"][1]["inside"]
    assert values["cells"][0]["chance"] == 1 / 50_000 and values["n"] == 12
    assert model.calls < 2 * 20, "an answer ends as soon as both rules have decided"


class Deaf(tiny.CopyModel):
    def _next(self, ids: list[int]) -> int:
        return 40


def test_a_model_that_does_not_listen_finds_none_and_is_heard_out() -> None:
    model = Deaf(tiny.CopyConfig()).eval()
    config = PasskeyConfig(forms=["coca"], lengths=[256], samples=3, max_new_tokens=12)
    values = Passkey().run(tiny.subject(model, external=True), config)
    assert values["cells"][0]["correct"] == {"first number": "000", "substring": "000"}
    assert model.calls == 12


def by_hand(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    out = list(ids)
    for _ in range(count):
        with torch.no_grad():
            out.append(int(model(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("make", [tiny.llama, tiny.ours])
def test_neither_batch_nor_cache_nor_padding_side_changes_an_answer(make: Any) -> None:
    model = make().double()
    subject = tiny.subject(model, external=True)
    prompts = published(subject, PasskeyConfig(samples=5), FORMS["coca"], 200, "uniform", 16)
    together = answers(subject, prompts, 9)
    alone = answers(subject, prompts, 9, batch_tokens=1)
    words = tiny.tokenizer()
    words.padding_side = "left"
    left = answers(tiny.subject(model, external=True, tokenizer=words), prompts, 9)
    hand = [words.decode(by_hand(model, prompt.ids.tolist(), 9)) for prompt in prompts]
    assert [reply.text for reply in together] == hand
    assert together == alone == left


def test_a_models_own_habits_of_speech_are_left_out_and_given_back() -> None:
    model = tiny.llama().double()
    subject = tiny.subject(model, external=True)
    prompts = published(subject, PasskeyConfig(samples=2), FORMS["coca"], 200, "uniform", 16)
    plain = answers(subject, prompts, 9)
    own = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=3.0, eos_token_id=None)
    model.generation_config = own
    assert answers(subject, prompts, 9) == plain
    assert model.generation_config is own


def test_a_dynamic_scaling_of_hugging_face_is_settled_for_the_whole_request() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny.llama(rope_parameters=scaling).double()
    config = PasskeyConfig(forms=["coca"], lengths=[200], samples=2, max_new_tokens=8)
    Passkey().run(tiny.subject(model, external=True), config)
    rotary = model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq), "nothing is left of the long prompt"
    # By hand: the base of 208 tokens, from the formula, as a plain rotary embedding.
    theta = 1e4 * (4 * 208 / 16 - 3) ** (8 / 6)
    frozen = tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": theta}).double()
    subject = tiny.subject(model, external=True)
    prompts = published(subject, config, FORMS["coca"], 200, "uniform", 16)
    with rescaled(model, length=208):
        said = answers(subject, prompts, 8)
    hand = [tiny.tokenizer().decode(by_hand(frozen, prompt.ids.tolist(), 8)) for prompt in prompts]
    assert [reply.text for reply in said] == hand


def test_a_dynamic_scaling_of_ours_is_that_of_prompt_and_answer_together() -> None:
    model = tiny.ours().double()
    subject = tiny.subject(model, external=True)
    prompts = published(subject, PasskeyConfig(samples=2), FORMS["coca"], 200, "uniform", 16)
    with rescaled(model, {"rope_type": "dynamic", "factor": 4.0}, trained=16, length=208):
        said = answers(subject, prompts, 8)
        for prompt, reply in zip(prompts, said, strict=True):
            ids = torch.from_numpy(prompt.ids)[None]
            for _ in range(8):
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False, rope_length=208).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            assert reply.text == tiny.tokenizer().decode(ids[0, 200:].tolist())


def test_the_native_form_asks_one_needle_of_the_training(subject: Subjects) -> None:
    config = PasskeyConfig(lengths=[96, 256], samples=10)
    values = Passkey().run(subject(FakeModel(copier(512, window=100)), training_length=96), config)
    short, long = values["cells"]
    assert short["form"] == "native" and short["correct"] == {"exact": "1" * 10}
    assert set(short["inside"]) == {"1"}
    # It sees 100 tokens back, so what it finds in the longer text is what stands near the question.
    assert "0" in long["correct"]["exact"] and "1" in long["inside"]
    pairs = list(zip(long["correct"]["exact"], long["inside"], strict=True))
    assert all(found == "0" for found, inside in pairs if inside == "0")
    assert 0 < long["chance"] < 0.01


def test_lengths_that_a_model_cannot_take_are_left_out() -> None:
    config = PasskeyConfig(forms=["coca"], lengths=[200], samples=1)
    values = Passkey().run(tiny.subject(tiny.gpt2(), external=True), config)
    assert "264 tokens is more than the model takes" in values["skipped"]


def run_of(values: dict[str, dict[str, Any]]) -> RunResults:
    arms = [
        ArmResults(name, name, "softmax", {0: SeedResults(results={"passkey": {"config": {}, "values": v}})})
        for name, v in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


def test_the_report_pools_what_lies_past_training_and_says_what_it_cannot_tell() -> None:
    config = PasskeyConfig(forms=["mohtashami", "coca"], lengths=[256, 512], samples=8, max_new_tokens=12)
    found = Passkey().run(
        tiny.subject(tiny.CopyModel(tiny.CopyConfig()).eval(), external=True, training_length=256), config
    )
    missed = Passkey().run(
        tiny.subject(Deaf(tiny.CopyConfig()).eval(), external=True, training_length=256), config
    )
    section = Passkey().section(run_of({"copier": found, "deaf": missed}))
    assert "512 tokens, 2 times the training length: deaf is worse than copier by 1.00" in section.answer
    estimate = section.headlines[0].estimate
    assert estimate is not None and (estimate.value, estimate.n) == (1.0, 8)
    rows = section.tables[1].rows
    assert "inside 1.00" in str(rows[1][1]) and "outside 1.00" in str(rows[1][1])
    same = Passkey().section(run_of({"a": missed, "b": missed}))
    assert "No difference from a detected for b" in same.answer
    assert any("Chance" in note for note in same.notes)
