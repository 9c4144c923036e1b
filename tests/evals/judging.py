"""Endpoints for the tests of judges: one that answers as it is told, over real HTTP, and tiny local judges."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from clearhead.evals.faithfulness.judges.base import Case
from tests.evals import tiny

Answer = tuple[int, str, dict[str, str]]
"""(status, body, headers)."""

SKY = Case("qa", "The sky is blue.", ("blue",), "It is blue", "What is the sky?")


def completion(text: str | None, tokens: tuple[int, int] = (100, 10), finish: str = "stop") -> Answer:
    """A chat completion in the usual form."""
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]},
    }
    return 200, json.dumps(body), {}


@dataclass
class Fake:
    """What an endpoint was asked, and when; ``at_once``: the most requests that it had at a time."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    running: int = 0
    at_once: int = 0


@contextmanager
def endpoint(reply: Callable[[int, dict[str, Any]], Answer], delay: float = 0.0) -> Iterator[Fake]:
    """``reply(number of the request, its body)`` answers, after ``delay`` seconds."""
    fake, lock, over = Fake(), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(fake.asked)
                fake.asked.append({"path": self.path, **body})
                fake.keys.append(self.headers.get("Authorization"))
                fake.times.append(time.monotonic())
                fake.running += 1
                fake.at_once = max(fake.at_once, fake.running)
            over.wait(delay)
            status, text, headers = reply(number, body)
            with lock:
                fake.running -= 1
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                # The client has gone: it did not wait that long.
                pass

        def log_message(self, *unused: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


CONCLUDED = "**Conclusion: True**"
SAID = "<|said|>"


def chain(folder: Path) -> Path:
    """A real, tiny chat model on disk that answers every message with ``**Conclusion: True**`` and ends.

    Its layers add nothing, so the next token depends on the last one alone.
    """
    words = tiny.tokenizer()
    words.add_tokens([CONCLUDED])
    words.add_special_tokens({"additional_special_tokens": [SAID]})
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + SAID
    model = tiny.llama(len(words), hidden_size=64, max_position_embeddings=4096, tie_word_embeddings=False)
    said, concluded = words.convert_tokens_to_ids([SAID, CONCLUDED])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = model.model.embed_tokens.weight
        model.lm_head.weight.zero_()
        model.lm_head.weight[concluded] = 100 * table[said]
        model.lm_head.weight[words.eos_token_id] = 100 * table[concluded]
    model.config.eos_token_id = model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
