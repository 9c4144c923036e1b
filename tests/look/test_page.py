"""The page: its numbers are the model's, and in a browser a pointer over a token shows them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.look.figure import row
from clearhead.look.making import make_file
from clearhead.look.opening import find_marks, kind_of, read_text
from clearhead.look.page import page
from clearhead.look.view import STEPS, View, make_view
from tests.look import small

DRIVER = shutil.which("chromedriver")


def view_of(attention: str, **options: Any) -> View:
    read = read_text(small.tokenizer(), small.TEXT)
    marks = find_marks(read, ["grey dog"])
    return make_view(small.model(attention), read, name=attention, kind="tiny", marks=marks, **options)


def effective_of(attention: str) -> list[torch.Tensor]:
    model = small.model(attention)
    model.set_attn_implementation("eager")
    ids = torch.tensor(read_text(small.tokenizer(), small.TEXT).ids)
    with torch.no_grad():
        return [
            one[0] for one in model(input_ids=ids[None], output_attentions=True, use_cache=False).attentions
        ]


@pytest.mark.parametrize("attention", ["softmax", "differential", "differential_v2"])
def test_a_row_is_what_the_model_gives(attention: str) -> None:
    view, expected = view_of(attention), effective_of(attention)
    last = len(view.text.ids) - 1
    mean = torch.stack(expected)[:, :, last].mean((0, 1)).numpy()
    found = row(view)[-1]
    kept = found != 0
    # What is kept is right to the steps of 16 bits, and what is left out is small.
    np.testing.assert_allclose(found[kept & (abs(mean) > 1e-3)], mean[kept & (abs(mean) > 1e-3)], atol=2e-3)
    one = view_of(attention, layers=[1], heads=[0])
    exact = expected[1][0, last].numpy()
    found = row(one)[-1]
    kept = found != 0
    np.testing.assert_allclose(found[kept], exact[kept], atol=2 / STEPS)
    assert abs(exact[~kept]).max() <= abs(exact[kept]).max()


def test_shares_and_left_out_are_exact() -> None:
    view, expected = view_of("differential"), effective_of("differential")
    assert (
        view.gates is not None and view.gates.shape == (4, len(view.text.ids)) and view.heads == [[0, 1]] * 2
    )
    gates = view.gates.reshape(2, 2, -1)
    first, mark = view.marks
    assert (first.start, first.end) == (0, 1) and view.text.text[view.text.spans[mark.start][0] :].startswith(
        "grey dog"
    )
    shares = (view.shares / STEPS).reshape(2, 2, *view.shares.shape[1:])
    for layer in range(2):
        signed = shares[layer, :, :, 0] - gates[layer][..., None] * shares[layer, :, :, 1]
        for m, one in enumerate((first, mark)):
            exact = expected[layer][:, :, one.start : one.end].sum(-1).numpy()
            np.testing.assert_allclose(signed[..., m], exact, atol=3 / STEPS)
    assert ((view.kept / STEPS) <= 1 + 1e-4).all()


def test_few_bytes_keep_the_last_rows_and_every_row_some_keys() -> None:
    view = view_of("differential_v2", limit=2000)
    assert view.first > 0 and view.most >= 4
    assert len(view.keys) == 2 * 4 * sum(min(view.most, p + 1) for p in range(view.first, len(view.text.ids)))
    assert view_of("softmax", last=5).first == len(view.text.ids) - 5


def test_nothing_in_a_text_ends_the_script_and_the_data_reads_back() -> None:
    view = view_of("differential")
    made = page([view])
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', made, re.S)
    assert data is not None
    (told,) = json.loads(data[1])
    assert told["text"] == small.TEXT and told["heads"] == [[0, 1], [0, 1]] and told["streams"] == 2
    keys = np.frombuffer(zlib.decompress(base64.b64decode(told["arrays"]["keys"])), "<u2")
    assert (keys == view.keys).all()
    assert "http" not in made.replace("http-equiv", "")


def test_the_command_draws_pages_and_pictures(tmp_path: Path) -> None:
    ours = small.saved(small.model("differential"), tmp_path / "v1")
    twin = small.saved(small.model("softmax"), tmp_path / "twin")
    (tmp_path / "text.txt").write_text(small.TEXT)
    page_file, picture = tmp_path / "look.html", tmp_path / "look.svg"
    done = CliRunner().invoke(app, ["look", str(ours), "--against", str(twin), "--text", str(tmp_path / "text.txt"),
                                    "--mark", "grey dog", "--out", str(page_file)])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert page_file.stat().st_size < 5e6 and "v1 and twin" in page_file.read_text()
    make_file([str(ours)], small.TEXT, picture, layers=[1])
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": "look.txt"}, "must end with .html"),
        ({"out": "nowhere/look.html"}, "there is no directory"),
        ({"text": " "}, "--text is empty"),
        ({"text": "no/such/file.txt"}, "looks like a file, and there is none"),
        ({"text": "nofile.txt"}, "looks like a file, and there is none"),
        ({"text": "a\udcffb"}, "--text holds bytes that are no UTF-8 text"),
        ({"layers": []}, "layers is empty"),
        ({"last": -3}, "last must be at least 1, not -3"),
        ({"marks": ["cat"]}, "--mark 'cat' is not in the text"),
        ({"layers": [7]}, "layer 7 is not there: the model has layers 0 to 1"),
        ({"heads": [2]}, "head 2 is not there: the model has heads 0 to 1"),
        ({"models": ["nowhere/at/all"]}, "neither a run directory nor a trained model"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = small.saved(small.model("differential"), tmp_path / "v1")
    given: dict[str, Any] = {"models": [str(model)], "text": small.TEXT, "out": "look.html"} | change
    with pytest.raises(ValueError, match=re.escape(said)):
        make_file(given.pop("models"), given.pop("text"), tmp_path / given.pop("out"), **given)
    assert not list(tmp_path.glob("look.*"))


@pytest.mark.parametrize("change", [{"marks": ["cat"]}, {"layers": [7]}])
def test_no_weights_are_loaded_for_what_the_text_and_configuration_refuse(
    change: dict[str, Any], tmp_path: Path
) -> None:
    model = small.saved(small.model("differential"), tmp_path / "v1")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not in the text|layer 7 is not there"):
        make_file([str(model)], small.TEXT, tmp_path / "look.html", **change)


def test_places_in_the_text_are_those_of_javascript() -> None:
    text = "hi 😀 there 𝒳 <b>"
    view = make_view(small.model("softmax"), read_text(small.tokenizer(), text), name="", kind="")
    units = text.encode("utf-16-le")
    pieces = [units[2 * a : 2 * b].decode("utf-16-le", "replace") for a, b in view.packed()["spans"]]
    assert pieces[1:4] == ["h", "i", " "] and pieces[-3:] == ["<", "b", ">"]


def test_chosen_heads_keep_their_numbers_and_pictures_leave_nothing_out() -> None:
    view = view_of("softmax", heads=[3, 1, 3], layers=[1])
    assert view.heads == [[3, 1]] and view.layers == [1]
    whole = view_of("softmax", last=1, every_key=True, limit=1)
    np.testing.assert_allclose(row(whole)[0].sum(), 1.0, atol=len(whole.text.ids) / STEPS)


LAYERS = [{"attention": "differential"}, {}, {"attention": "differential_v2", "sliding_window": 7}]


def test_layers_that_differ_in_streams_and_heads_are_shown_together() -> None:
    made = small.model("softmax", num_hidden_layers=3, layers=LAYERS)
    read = read_text(small.tokenizer(), small.TEXT)
    view = make_view(made, read, name="hybrid", kind=kind_of(made), limit=10**7)
    assert [len(heads) for heads in view.heads] == [2, 4, 4] and view.single == [False, True, False]
    assert view.kind == "differential and softmax and differential_v2, 3 layers that differ"
    made.set_attn_implementation("eager")
    ids = torch.tensor(read.ids)[None]
    with torch.no_grad():
        maps = made(input_ids=ids, output_attentions=True, use_cache=False).attentions
    expected = torch.cat([one[0, :, -1] for one in maps]).mean(0).numpy()
    np.testing.assert_allclose(row(view)[-1], expected, atol=3 / STEPS)
    page([view])


class Browser:
    """Chromium through its driver, by the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}}
        self.session = self.send("POST", "/session", wanted)["sessionId"]

    def send(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.base + path, None if body is None else json.dumps(body).encode(), method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def do(self, path: str, **body: Any) -> Any:
        return self.send("POST", f"/session/{self.session}{path}", body)

    def run(self, script: str) -> Any:
        return self.do("/execute/sync", script=script, args=[])

    def point(self, x: float, y: float, press: bool = False) -> None:
        steps: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0, "x": int(x), "y": int(y)}]
        if press:
            steps += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self.do("/actions", actions=[mouse])


@pytest.fixture
def browser() -> Iterator[Browser]:
    if DRIVER is None:
        pytest.skip("no chromedriver on this machine: the page is not tried with a pointer")
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = next(
            int(found[1])
            for line in process.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        made = Browser(port)
        yield made
        made.send("DELETE", f"/session/{made.session}")
    finally:
        process.kill()


def test_a_pointer_shows_a_tokens_row(browser: Browser, tmp_path: Path) -> None:
    views = [view_of("differential"), view_of("softmax")]
    (tmp_path / "look.html").write_text(page(views))
    browser.do("/url", url=f"file://{tmp_path}/look.html")
    end = time.monotonic() + 20
    while browser.run("return document.body.dataset.ready") != "yes":
        assert time.monotonic() < end, "the page never finished drawing"
        time.sleep(0.05)
    token = 30
    # A head first, by a press; then a token, by pointing at it.
    middle = "const r = {}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
    cell = "state.views[0].cells.find(c => c.layer === 1 && c.head === 1).made"
    browser.point(*browser.run(middle.format(cell)), press=True)
    browser.point(*browser.run(middle.format(f"state.views[0].tokens[{token}]")))
    shown = browser.run(
        "const view = state.views[0], lines = [...view.table.rows].slice(1);"
        "return [state.views.map(v => v.token), view.now.textContent,"
        "lines.map(line => [...line.cells].slice(1).map(cell => cell.textContent))]"
    )
    tokens, sentence, table = shown
    assert tokens == [token, token] and "layer 1, head 1" in sentence
    # The mean of all heads, with another map chosen: the last column is still the difference, taken head by head.
    browser.run("state.mode = 1; state.views[0].layer = state.views[0].head = -1; draw(state.views[0])")
    means = browser.run(
        "return [...state.views[0].table.rows].slice(1).map(r => [r.cells[1].textContent, r.cells[4].textContent])"
    )
    mean = torch.stack(effective_of("differential"))[:, :, token].mean((0, 1))
    for key, value in means:
        assert abs(float(value.replace("−", "-")) - float(mean[int(key)])) < 1e-4
    expected = effective_of("differential")[1][1, token]
    for key, _, _, value in table:
        assert abs(float(value.replace("−", "-")) - float(expected[int(key)])) < 1e-4
    order = [abs(float(line[3].replace("−", "-"))) for line in table]
    assert order == sorted(order, reverse=True) and int(table[0][0]) == int(expected.abs().argmax())
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
