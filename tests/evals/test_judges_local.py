"""Local judges, against oracles; and the judge behind an endpoint, against ``transformers serve`` itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from clearhead.evals.faithfulness.judges.base import Case, JudgeError, make_judge
from clearhead.evals.faithfulness.judges.nli import Nli, sentences
from clearhead.evals.faithfulness.judges.prompt import judge_prompt
from tests.evals import tiny
from tests.evals.judging import CONCLUDED, SAID, SKY, chain

SUMMARY = Case(
    "summarisation",
    "The grass is green. The sky is blue; keys are hidden.",
    ("Green.",),
    "It is green! Blue.",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(address, model) of a server that is still starting: :func:`healthy` waits for it."""
    folder = tmp_path_factory.mktemp("served")
    model = str(chain(folder / "chain"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    assert program.exists(), "transformers brings its own program"
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [str(program), "serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        yield f"http://127.0.0.1:{port}", model
    finally:
        process.kill()
        process.wait()
        log.close()


def healthy(address: str, seconds: float = 120.0) -> None:
    for _ in range(int(seconds / 0.1)):
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("transformers serve has not come up")


@pytest.fixture(scope="module")
def judges(served: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of tiny judges. The server starts meanwhile."""
    folder = tmp_path_factory.mktemp("judges")
    plain = tiny.save(folder / "plain", max_position_embeddings=2048)
    words = tiny.tokenizer()
    torch.manual_seed(1)
    for name, labels in {
        "nli": {0: "CONTRADICTION", 1: "Neutral", 2: "entailment"},
        "mood": {0: "bad", 1: "fair", 2: "good"},
    }.items():
        config = LlamaConfig(
            vocab_size=len(words), **tiny.SIZES, num_key_value_heads=2, max_position_embeddings=120,
            initializer_range=0.3, pad_token_id=0, id2label=labels, label2id={v: k for k, v in labels.items()},
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return {"plain": str(plain), **{name: str(folder / name) for name in ("nli", "mood")}}


def prepared(name: str, **options: Any) -> Any:
    judge = make_judge(name, options)
    judge.prepare()
    return judge


def test_a_local_judge_weighs_true_against_false(judges: dict[str, str]) -> None:
    """Oracle: one continuation at a time, unpadded, in float64."""
    judge = prepared("local", model=judges["plain"], batch_tokens=1)
    cases = [SKY, SUMMARY, Case("qa", "A key. " * 20, ("key",), "Grass", "What?")]
    model = tiny.llama(len(tiny.tokenizer()), max_position_embeddings=2048).double()
    words = tiny.tokenizer()
    found = dict(judge.judge(cases))
    wide = dict(prepared("local", model=judges["plain"]).judge(cases))
    for index, case in enumerate(cases):
        prompt = f"{words.bos_token}{judge_prompt(case, explain=False)}\n\n**Conclusion:"
        sums = []
        for word in (" True", " False"):
            ids = words(prompt + word, add_special_tokens=False)["input_ids"]
            tail = len(words(word, add_special_tokens=False)["input_ids"])
            with torch.inference_mode():
                nats = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            sums.append(sum(float(nats[k - 1, ids[k]]) for k in range(len(ids) - tail, len(ids))))
        assert found[index].faithful is (sums[0] > sums[1]) is wide[index].faithful
        assert found[index].reason == f"log-likelihood of True {sums[0]:.3f}, of False {sums[1]:.3f}"
    short = prepared("local", model=judges["plain"], max_length=50)
    assert "the judge takes 50" in dict(short.judge([SKY]))[0].reason
    assert dict(short.judge([SKY]))[0].faithful is None


def test_a_chat_model_is_asked_in_its_template(served: tuple[str, str]) -> None:
    judge = prepared("local", model=served[1])
    text = judge.text(SKY)
    assert text == f"user: {judge_prompt(SKY, explain=False)}\n{SAID}**Conclusion:"


def test_sentences_and_chunks(judges: dict[str, str]) -> None:
    assert sentences('He said "No." Then 3.5 more!\nEnd') == ['He said "No.', "Then 3.5 more!", "End"]
    judge = prepared("nli", model=judges["nli"])
    text = "The sky is blue. " * 6 + "grass " * 40 + "green" * 30
    for room in (16, 40, 1000):
        chunks = judge.chunks(text, room)
        assert "".join("".join(chunks).split()) == "".join(text.split()), "nothing is lost"
        assert all(len(judge.tokenizer(chunk)["input_ids"]) <= room for chunk in chunks)
    assert len(judge.chunks(text, 1000)) == 1


def test_an_nli_judge_wants_every_sentence_entailed_by_some_chunk(judges: dict[str, str]) -> None:
    """Oracle: each pair alone, unpadded; the greatest over chunks, the least over sentences."""
    judge = prepared("nli", model=judges["nli"], chunk_tokens=8, batch_size=3)
    assert isinstance(judge, Nli)
    model = LlamaForSequenceClassification.from_pretrained(judges["nli"]).eval()
    for case in (SUMMARY, SKY):
        claims = ["It is green!", "Blue."] if case is SUMMARY else ["What is the sky? It is blue"]
        chunks = judge.chunks(case.document, 8)
        assert case is SKY or len(chunks) > 1
        best = []
        for claim in claims:
            scores = []
            for chunk in chunks:
                with torch.inference_mode():
                    logits = model(**judge.tokenizer(chunk, claim, return_tensors="pt")).logits[0]
                scores.append(float(logits.softmax(-1)[2]))
            best.append(max(scores))
        found = dict(judge.judge([case]))[0]
        assert f"the least supported {min(best):.3f}" in found.reason
        for threshold in (min(best) - 1e-3, min(best) + 1e-3):
            other = prepared("nli", model=judges["nli"], chunk_tokens=8, threshold=threshold)
            assert dict(other.judge([case]))[0].faithful is (threshold < min(best))
    long = Case("summarisation", "A text.", (), "green " * 300)
    assert "leaves no room" in dict(judge.judge([long]))[0].reason
    assert dict(judge.judge([Case("summarisation", "A text.", (), " \n ")]))[0].faithful is None


def test_models_that_cannot_judge_say_why(judges: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="has the labels bad, fair, good; an NLI model has entailment"):
        prepared("nli", model=judges["mood"])
    for name in ("local", "nli"):
        with pytest.raises(JudgeError, match="the judge"):
            prepared(name, model=str(tmp_path))
    shutil.copytree(judges["plain"], tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(JudgeError, match=r"the judge in .* cannot be loaded"):
        prepared("local", model=str(tmp_path / "broken"))


def test_a_real_server_judges(served: tuple[str, str], judges: dict[str, str], tmp_path: Path) -> None:
    """``transformers serve`` with a real model: what it says, counts and refuses is read right."""
    address, model = served
    healthy(address)
    options = {"api_key_env": "", "base_url": f"{address}/v1", "max_tokens": 16, "concurrency": 2}
    judge = prepared("openai", model=model, cache=str(tmp_path / "replies.jsonl"), **options)
    found = dict(judge.judge([SKY, SUMMARY]))
    assert {index: verdict.faithful for index, verdict in found.items()} == {0: True, 1: True}
    assert found[0].reason == CONCLUDED
    used = judge.usage()
    assert used["requests"] == 2 and used["completion_tokens"] >= 2
    words = tiny.tokenizer()
    assert used["prompt_tokens"] > 100 and len(words) < 400
    assert dict(judge.judge([SUMMARY, SKY]))[0].faithful and judge.usage()["requests"] == 2, "from the cache"
    wrong = prepared(
        "openai", model="nobody/nothing", cache=str(tmp_path / "other.jsonl"), retries=0, **options
    )
    try:
        refused = dict(wrong.judge([SKY]))
    except JudgeError as error:
        assert "answers" in str(error)
    else:
        assert refused[0].faithful is None and "answers 4" in refused[0].reason
