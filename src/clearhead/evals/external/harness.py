"""A model as lm-evaluation-harness takes it, whose scores do not depend on what else stands in a batch.

The harness pads requests that it scores on the right and gives no mask. For most models that changes nothing; under a
rotary scaling that depends on the length padding counts as text, and Hugging Face's models go on with the frequencies
of the longest text so far. So then requests of one length are read together, the scaling settled for that length
(answers: for prompt and new tokens), as everywhere in this library.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from clearhead.evals.probing.adapter import adapter_of
from clearhead.evals.probing.rescaling import rescaled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)


def harness_model(model: PreTrainedModel, tokenizer: Any, batch_size: int, **settings: Any) -> Any:
    """The harness's `HFLM` of `model`; `settings` are further arguments of it. Needs lm-eval."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class OneLengthAtATime(HFLM):  # type: ignore[misc]
        """Every request as in a batch of one."""

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            def tokens(request: Any) -> int:
                # The last token is predicted, never read.
                return int(min(len(request[1]) + len(request[2]), self.max_length + 1) - 1)

            def score(length: int, some: list[Any]) -> list[tuple[float, bool]]:
                with rescaled(self.model, length=length):
                    return super(OneLengthAtATime, self)._loglikelihood_tokens(  # type: ignore[no-any-return]
                        some, disable_tqdm=True, override_bs=override_bs
                    )

            return in_groups(requests, tokens, score)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            def tokens(request: Any) -> tuple[int, int]:
                context, options = request.args
                new = int(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"])
                ids, _ = self.tok_batch_encode([context], left_truncate_len=self.max_length - new)
                return int(ids.shape[1]), new

            def answer(sizes: tuple[int, int], some: list[Any]) -> list[str]:
                with rescaled(self.model, length=sum(sizes)):
                    return super(OneLengthAtATime, self).generate_until(some, disable_tqdm=True)  # type: ignore[no-any-return]

            return in_groups(requests, tokens, answer)

    kind = OneLengthAtATime if adapter_of(model).frequencies_depend_on_length() else HFLM
    return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **settings)


def in_groups(
    items: Sequence[T], key: Callable[[T], K], work: Callable[[K, list[T]], Sequence[R]]
) -> list[R]:
    """`work(key, those items that have it)` for every key, its results in the order of `items`."""
    groups: dict[K, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(key(item), []).append(place)
    found: dict[int, R] = {}
    for kind, places in groups.items():
        found.update(zip(places, work(kind, [items[place] for place in places]), strict=True))
    return [found[place] for place in range(len(items))]
