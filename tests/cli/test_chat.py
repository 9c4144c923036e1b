"""`clearhead chat`: every answer is the one that the whole conversation, read anew, would get."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evals import tiny
from typer.testing import CliRunner

from clearhead.cli import chat
from clearhead.cli.chat import Talk
from clearhead.cli.main import app

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def conversation(template: str | None = None, **settings: Any) -> Talk:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    model = tiny.ours(max_position_embeddings=512, **settings)
    model.generation_config.eos_token_id = None
    return Talk(model, tokenizer, max_new_tokens=6, temperature=0.0, top_p=1.0)


def anew(talk: Talk, prompt: list[int]) -> list[int]:
    """Greedy tokens behind `prompt`, each from a whole pass without a cache."""
    ids = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(talk.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("attention", ["softmax", "differential", "collinear"])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_answers_are_those_of_the_whole_conversation(attention: str, template: str | None) -> None:
    talk = conversation(template, attention=attention)
    for line in ("The grass is green", "what is hidden here?", "A passkey."):
        prompt = talk._prompt(line)
        answer = talk.answer(line)
        assert talk.ids == anew(talk, prompt)
        assert answer == talk.tokenizer.decode(talk.ids[len(prompt) :], skip_special_tokens=True)
    if template is None:
        # What was said before is not read again.
        assert talk.cache.get_seq_length() == len(talk.ids) - 1
        assert talk._cache(talk._prompt("more")) is talk.cache


def test_under_dynamic_scaling_the_conversation_is_one_request() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    talk = conversation(attention="softmax", rope_parameters=rope)
    talk.model.config.max_position_embeddings = 16
    talk.answer("The grass is green and the sky is blue")
    assert talk._cache(talk._prompt("what is hidden here?")) is None


def test_a_stopped_answer_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(attention="differential")
    talk.answer("The grass is green")
    before = list(talk.ids)
    prompt = talk._prompt("what is hidden here?")
    generate = talk.model.generate

    def stopped(*arguments: Any, **options: Any) -> None:
        generate(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(talk.model, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            talk.answer("what is hidden here?")
    talk.forget_answer()
    assert talk.ids == before
    talk.answer("what is hidden here?")
    assert talk.ids == anew(talk, prompt)


def test_from_a_pipe(tmp_path: Path) -> None:
    tiny.ours(max_position_embeddings=512, attention="differential").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    typed = "The grass\n/what\n\n/reset\nA passkey\n/quit\nnot read\n"
    arguments = ["chat", str(tmp_path), "--max-new-tokens", "4", "--temperature", "0"]
    done = CliRunner().invoke(app, arguments, input=typed, catch_exceptions=False)
    assert done.exit_code == 0
    assert "It continues the text" in done.stderr
    assert "/what is no command" in done.stderr and "Forgotten." in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_lines_end_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  one \ntwo"))
    assert list(chat._lines()) == ["one", "two"]
