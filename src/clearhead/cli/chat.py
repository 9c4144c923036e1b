"""`clearhead chat`: a conversation with a model in the terminal."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clearhead.cli.console import say

if TYPE_CHECKING:
    import torch

HELP = "/reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer."


def command(
    model: Annotated[
        Path, typer.Argument(help="A model directory, or the job directory it is in.", show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
) -> None:
    """Talk to a model; every line is answered from all that was said before, out of one cache.

    With a chat template the lines are messages; without one the model continues the text, and each line is put behind
    what stands there already.
    """
    from clearhead.cli.models import load_model

    network, tokenizer = load_model(model)
    import torch

    torch.manual_seed(seed)
    talk = Talk(network, tokenizer, max_new_tokens, temperature, top_p)
    say(("It answers messages. " if talk.template else "It continues the text that you type. ") + HELP)
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            talk.reset()
            say("Forgotten.")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command. {HELP}")
        elif line:
            try:
                talk.answer(line)
            except KeyboardInterrupt as stop:
                if stop.args:  # A signal that ends the command, not Ctrl-C.
                    raise
                talk.forget_answer()
                say("\n(stopped; the answer is forgotten)")


class Talk:
    """What was said, in tokens, and the cache that holds it."""

    def __init__(
        self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template = bool(getattr(tokenizer, "chat_template", None))
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.cache: Any = None

    def forget_answer(self) -> None:
        """Go back to before the message that was being answered; what the cache holds of it is read anew."""
        self.cache = None

    def answer(self, line: str) -> str:
        """Print and return the answer to `line`, word by word as it comes."""
        import torch
        from transformers import TextStreamer

        prompt = self._prompt(line)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and len(prompt) + 1 > room and not self._looks_at_length():
            say(f"(the conversation is {len(prompt):,} tokens long, the model was made for {room:,}: /reset)")
        ids = torch.tensor([prompt], device=self.model.device)
        produced = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache(prompt),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
            **self.sampling,
        )
        return self._keep(line, prompt, produced.sequences[0], produced.past_key_values)

    def _prompt(self, line: str) -> list[int]:
        if self.template:
            messages = [*self.messages, {"role": "user", "content": line}]
            found = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return list(found["input_ids"])
        bos = self.tokenizer.bos_token_id
        start = self.ids or ([] if bos is None else [int(bos)])
        glue = "" if not self.ids else "\n"
        return start + list(self.tokenizer.encode(glue + line, add_special_tokens=False))

    def _cache(self, prompt: list[int]) -> Any:
        """The cache as far as the prompt begins with what it holds; a new one where it does not."""
        if self.cache is None or self._looks_at_length():
            return None
        held = self.cache.get_seq_length()
        return self.cache if prompt[:held] == self.ids[:held] and held < len(prompt) else None

    def _looks_at_length(self) -> bool:
        """Whether the rope scaling turns keys by the length of the request, so that none may be kept for the next."""
        parameters = getattr(self.model.config, "rope_parameters", None) or {}
        # One set for all layers, or one for each kind of them.
        every = (parameters, *(one for one in parameters.values() if isinstance(one, dict)))
        return any(one.get("rope_type") in ("dynamic", "longrope") for one in every)

    def _keep(self, line: str, prompt: list[int], produced: "torch.Tensor", cache: Any) -> str:
        answer = self.tokenizer.decode(produced[len(prompt) :], skip_special_tokens=True)
        self.ids, self.cache = produced.tolist(), cache
        end = self.tokenizer.eos_token_id
        if not self.template and self.ids and self.ids[-1] == end:
            # The text goes on behind an end.
            self.ids = self.ids[:-1]
        if self.template:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        return str(answer)


def _lines() -> Iterator[str]:
    """What the person types, line by line; from a pipe the same without a prompt."""
    while True:
        if sys.stdin.isatty():
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        yield line.strip()
