"""Sources and targets that somebody made to do harm, or by accident: one sentence, nothing run, nothing left."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from clearhead.convert.carrying import load_tokenizer
from clearhead.convert.run import convert
from clearhead.convert.weights import ConversionError, read_header
from tests.convert.support import SIZES, nothing_left, save
from tests.evals import tiny

ROW = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
DEEP = b"[" * 100_000


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**SIZES)))


def refused(source: Path, out: Path, words: str) -> None:
    with pytest.raises(ConversionError) as error:
        convert(str(source), out)
    message = str(error.value)
    assert words in message and "\n" not in message, message
    assert nothing_left(out)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"a": {**ROW, "data_offsets": [-16, 48]}}, "not made of natural numbers"),
        ({"a": {**ROW, "shape": [-4, -4]}}, "not made of natural numbers"),
        ({"a": {**ROW, "shape": [4.0, 4]}}, "not made of natural numbers"),
        ({"a": ROW, "b": ROW}, "'b' does not begin where the tensor before it ends"),
        ({"a": {**ROW, "shape": [3, 4], "data_offsets": [16, 64]}}, "'a' does not begin where"),
        ({"a": {**ROW, "dtype": "F4"}}, "in F4, which is not converted"),
        ({"a": 5}, "is not a safetensors file, or damaged"),
        ([], "is not a safetensors file, or damaged"),
        (DEEP, "is not a safetensors file, or damaged"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_tables_of_tensors_that_cannot_be(table: Any, words: str, tmp_path: Path) -> None:
    """A place before the tensors would read the table as weights, two tensors in one place one for the other."""
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(ConversionError) as error:
        read_header(file)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "listed", [None, [], ["a"], {"a": 5}, {"a": "/etc/passwd"}, {"a": "../llama/model.safetensors"}]
)
def test_an_index_names_files_beside_it_and_no_others(listed: Any, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (llama / "config.json").rename(tmp_path / "source/config.json")
    index = {"weight_map": listed}
    (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "source", tmp_path / "out", "has no weight_map from tensors to files beside it")


@pytest.mark.parametrize("kind", ["directory", "nowhere", "model.safetensors"])
def test_weights_that_are_no_file(kind: str, llama: Path, tmp_path: Path) -> None:
    """A directory, a link that leads nowhere, and one that leads to itself."""
    file = llama / "model.safetensors"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(kind)
    refused(llama, tmp_path / "out", "model.safetensors' cannot be read")


def test_configurations_that_are_no_table_of_keys(llama: Path, tmp_path: Path) -> None:
    file = llama / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "model_type": ["llama"]}))
    refused(llama, tmp_path / "out", "the model type ['llama']")
    file.write_bytes(DEEP)
    refused(llama, tmp_path / "out", "config.json' cannot be read")


class Planted:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_pickle_beside_the_weights_is_never_opened(llama: Path, tmp_path: Path) -> None:
    planted = pickle.dumps(Planted(tmp_path / "opened"))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "vocab.json", "merges.txt"):
        (llama / name).write_bytes(planted)
    convert(str(llama), tmp_path / "out")
    (llama / "model.safetensors").write_bytes(planted)
    refused(llama, tmp_path / "second", "is not a safetensors file")
    assert not (tmp_path / "opened").exists()
    pickle.loads(planted)
    assert (tmp_path / "opened").exists(), "it would have been seen"


@pytest.mark.parametrize("named", [True, False])
def test_a_tokenizer_with_code_is_not_run_and_nobody_is_asked(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("transformers asked at the terminal"))
    source = tiny.save(tmp_path / "source", tiny.llama())
    settings = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    if named:
        settings["tokenizer_class"] = "Theirs"  # type: ignore[assignment]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "theirs.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'opened')!r})\nclass Theirs: pass\n"
    )
    if named:
        refused(source, tmp_path / "out", "it needs code of its own, which is not run")
    else:
        convert(str(source), tmp_path / "out")
        assert load_tokenizer(tmp_path / "out").encode("The sky")
        assert not (tmp_path / "out/theirs.py").exists()
    assert not (tmp_path / "opened").exists()


def test_a_damaged_tokenizer_is_named_where_it_is(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", tiny.llama())
    (source / "tokenizer_config.json").write_text("{")
    refused(source, tmp_path / "out", f"{source / 'tokenizer_config.json'}' cannot be read")


def test_a_licence_is_not_a_way_to_other_files(llama: Path, tmp_path: Path) -> None:
    """A link out of the source stays behind; links of Hugging Face's cache do not lead out of it."""
    (tmp_path / "secret").write_text("a key")
    (llama / "LICENSE").symlink_to(tmp_path / "secret")
    (llama / "NOTICE").write_text("from here")
    convert(str(llama), tmp_path / "out")
    assert not (tmp_path / "out/LICENSE").exists() and (tmp_path / "out/NOTICE").read_text() == "from here"
    snapshot = tmp_path / "models--a--b/snapshots/0a1b"
    snapshot.parent.mkdir(parents=True)
    (llama / "LICENSE").unlink()
    llama.rename(snapshot)
    (tmp_path / "models--a--b/blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / "models--a--b/blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    convert(str(snapshot), tmp_path / "second")
    assert (tmp_path / "second/NOTICE").read_text() == "from here"


def test_a_target_that_is_a_link_or_has_no_name(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="exists already; choose another --out"):
        convert(str(llama), tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and not (tmp_path / "nowhere").exists()
    with pytest.raises(ConversionError, match="cannot be written"):
        convert(str(llama), tmp_path / ("x" * 300))


def test_directories_that_were_made_for_a_failed_target_are_gone(llama: Path, tmp_path: Path) -> None:
    file = llama / "config.json"
    content = file.read_text()
    file.write_text(json.dumps({**json.loads(content), "vocab_size": 62}))
    (tmp_path / "old").mkdir()
    refused(llama, tmp_path / "old/new/newer/out", "has the shape [61, 32]")
    assert (tmp_path / "old").is_dir() and not (tmp_path / "old/new").exists()
    file.write_text(content)
    convert(str(llama), tmp_path / "old/new/newer/out")
    assert (tmp_path / "old/new/newer/out/model.safetensors").exists()
