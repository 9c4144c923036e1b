"""Two programs as a person calls them, on a saved directory: `lm_eval` and `transformers serve` with OpenAI's client.

Part of `make test-peers`; each starts processes of its own and takes half a minute.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer

from clearhead.models import ClearheadForCausalLM
from tests.evals import tiny
from tests.load.server_process import BIN, PATIENCE, serving

DOCUMENTS = [
    {"text": "The grass is", "choices": [" green", " blue"], "label": 0},
    {"text": "The sky is", "choices": [" green", " blue"], "label": 1},
    {"text": "What is hidden?", "choices": [" A passkey.", " 0123456789"], "label": 0},
]
TASK = """
task: grass
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def saved(folder: Path) -> Path:
    model = tiny.ours(
        attention="differential", pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128
    )
    return tiny.save(folder, model)


def environment(folder: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "data")}
    return {**os.environ, **offline, "HF_MODULES_CACHE": str(folder / "modules")}


@torch.no_grad()
def test_lm_eval_from_the_shell(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/grass.yaml").write_text(TASK % (tmp_path / "documents.jsonl"))
    command: list[Any] = [BIN / "lm_eval", "--model", "hf", "--tasks", "grass"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "1"]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_grass*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(found) == len(DOCUMENTS)
    model, words = ClearheadForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in found:
        document = line["doc"]
        for choice, answer in zip(document["choices"], line["filtered_resps"], strict=True):
            before = len(words(document["text"])["input_ids"])
            ids = words(document["text"] + choice, return_tensors="pt")["input_ids"]
            logs = log_softmax(model(ids).logits[0, before - 1 : -1], -1)
            expected = float(logs.gather(-1, ids[0, before:, None]).sum())
            assert abs(float(answer[0]) - expected) < 1e-3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = saved(tmp_path / "model")
    with serving(folder, tmp_path) as address:
        yield address, folder


@torch.no_grad()
def test_transformers_serve(server: tuple[str, Path]) -> None:
    from openai import OpenAI

    address, folder = server
    client = OpenAI(base_url=address, api_key="none", timeout=PATIENCE, max_retries=0)
    asked: dict[str, Any] = {"model": str(folder), "prompt": "The grass", "max_tokens": 6, "temperature": 0}
    model, words = ClearheadForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = words("The grass", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    expected = words.decode(answer, skip_special_tokens=True)
    assert client.completions.create(**asked).choices[0].text == expected
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == expected
