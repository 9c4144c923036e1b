"""The binary judging prompt and how its answer is read.

The protocol is that of Lookback Lens (arXiv 2407.07071), which the Differential Transformer paper uses: the judge sees
the document, a right answer and the proposed one, says what is wrong, and ends with `**Conclusion: True**` or
`**Conclusion: False**`. The fields and the last line are as published; the instructions are written anew, so
verdicts compare within this library only.
"""

from __future__ import annotations

import re

from clearhead.evals.faithfulness.judges.base import Case

CONCLUSION = "**Conclusion:"
EXPLAIN = (
    "First say in a few sentences why. Then write a line that begins with **Problematic Spans:** and quotes the words "
    "of the proposed {what} that are not supported, or says none. End with a line of exactly this form:\n"
    "**Conclusion: True**\nor\n**Conclusion: False**"
)
BRIEF = "Answer with one line of exactly this form:\n**Conclusion: True**\nor\n**Conclusion: False**"
AGAIN = (
    "Your answer has no conclusion. Write only the last line, **Conclusion: True** or **Conclusion: False**."
)
SUMMARY = (
    "Check a proposed summary of a document for hallucination. It is True when everything that it says can be inferred "
    "from the document, and False when it says anything that the document does not support, however small. It need not "
    "resemble the ground truth summary, which is one good summary among many: leaving things out is not an error, "
    "nor is another choice of words."
)
ANSWER = (
    "Check a proposed answer to a question about a document for hallucination. It is True when it answers the question "
    "as the document does, and False when it says anything that the document does not support or that contradicts the "
    "ground truth answers. It need not use their words: an answer that means the same is True."
)
# Bounded, else a reply of nothing but colons would take hours.
LAST = re.compile(r"conclusion\W{0,40}?:\W{0,40}(true|false)\b", re.IGNORECASE)


def judge_prompt(case: Case, *, explain: bool = True) -> str:
    """What the judge is asked. explain: with its reasons, else the last line alone."""
    summary = case.task == "summarisation"
    end = EXPLAIN.format(what="summary" if summary else "answer") if explain else BRIEF
    if summary:
        fields = [
            ("Document", case.document),
            ("Ground Truth Summary", case.references[0] if case.references else "none is known"),
            ("Proposed Summary", case.proposed),
        ]
    else:
        fields = [
            ("Document", case.document),
            ("Question", case.question),
            ("Ground Truth Answers (any of them is right)", "; ".join(case.references) or "none is known"),
            ("Proposed Answer", case.proposed),
        ]
    shown = "\n\n".join(f"#{name}#: {text}" for name, text in fields)
    return f"{SUMMARY if summary else ANSWER}\n\n{shown}\n\n{end}"


def conclusion(text: str) -> bool | None:
    """What a judge's answer concludes; its last conclusion counts, None where it has none."""
    found = LAST.findall(text)
    return found[-1].lower() == "true" if found else None
