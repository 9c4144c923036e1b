"""A local causal language model as judge: the same prompt, its likelihood of "True" against "False" read off.

Nothing is generated: the prompt asks for the last line alone, the answer is begun with `**Conclusion:`, and the more
likely of the two words decides. So there is a verdict for every case that fits into the model. How good it is depends
on the model: below a few billion parameters it is close to a coin's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import Field

from clearhead.evals.asking.answering import MARK, continued, likelihoods
from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeConfig, Judgement
from clearhead.evals.faithfulness.judges.loading import load_judge
from clearhead.evals.faithfulness.judges.prompt import CONCLUSION, judge_prompt

AT_ONCE = 16
"""Cases that are scored together."""


class LocalConfig(JudgeConfig):
    """model: a directory or hub id of a causal language model. batch_tokens: tokens in a batch.

    max_length: the longest prompt (default: the model's max_position_embeddings). Longer ones are undecided, not cut.
    """

    model: str = Field(min_length=1)
    batch_tokens: int = Field(default=8192, ge=1)
    max_length: int | None = Field(default=None, ge=1)


class Local(Judge[LocalConfig]):
    name = "local"
    Config = LocalConfig

    def prepare(self) -> None:
        """Loads the model. Raises JudgeError where that is not possible."""
        from transformers import AutoModelForCausalLM

        self.tokenizer, self.model = load_judge(AutoModelForCausalLM, self.config.model)
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.longest: int | None = self.config.max_length or known

    def text(self, case: Case) -> str:
        """The whole prompt, up to the word that is judged."""
        asked = judge_prompt(case, explain=False)
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{asked}\n\n{CONCLUSION}"
        shown: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
        return shown.replace(MARK, asked) + CONCLUSION

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, Judgement]]:
        for start in range(0, len(cases), AT_ONCE):
            rows, indices = [], []
            for index in range(start, min(start + AT_ONCE, len(cases))):
                prompt = self.text(cases[index])
                pair = [continued(self.tokenizer, prompt, word) for word in (" True", " False")]
                size = max(len(ids) for ids, _ in pair)
                if self.longest is not None and size > self.longest:
                    why = f"the judge's prompt has {size} tokens, the judge takes {self.longest}"
                    yield index, Judgement(None, why)
                    continue
                # Read from where the two words part, so that both are given the same.
                first = min(begin for _, begin in pair)
                rows += [(ids, first) for ids, _ in pair]
                indices.append(index)
            sums = [sum(r) for r in likelihoods(self.model, rows, batch_tokens=self.config.batch_tokens)]
            for index, true, false in zip(indices, sums[::2], sums[1::2], strict=True):
                if math.isnan(true + false):
                    yield index, Judgement(None, "the judge's likelihoods are not numbers")
                    continue
                faithful = None if true == false else true > false
                yield index, Judgement(faithful, f"log-likelihood of True {true:.3f}, of False {false:.3f}")

    def described(self) -> str:
        return f"{self.config.model}, a local model, by the likelihood of True against False"
