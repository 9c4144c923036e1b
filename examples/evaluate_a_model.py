"""Evaluate a model that was not trained here, from Python: any Hugging Face directory, GGUF file or hub name.

    python examples/evaluate_a_model.py HuggingFaceTB/SmolLM2-135M novels.txt --out runs/smollm2

The same as `clearhead evaluate MODEL --corpus novels.txt --suite passkey --suite perplexity`, with the results in hand.
"""

import argparse
import json
from pathlib import Path

from clearhead.evals.runner import evaluate_external
from clearhead.evals.subjects.external import ExternalSpec
from clearhead.report.build import build_report
from clearhead.runs.results import load_run


def evaluate(model: str, corpus: str, out: Path, samples: int = 20) -> dict[str, dict[str, object]]:
    """Passkeys and perplexity of `model` on `corpus`: evaluation -> its values. Goes on where it was interrupted."""
    options = {
        "passkey": {"lengths": [256], "samples": samples},
        "perplexity": {"lengths": [256], "max_documents": samples},
    }
    evaluate_external(ExternalSpec(model, corpus=corpus), out, list(options), options=options, progress=print)
    (arm,) = load_run(out).arms
    (seed,) = arm.seeds.values()
    print(f"report: {build_report(out)}")
    return {name: record["values"] for name, record in seed.results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("corpus", help="a path, a glob, stdlib or hf:owner/name")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(evaluate(given.model, given.corpus, given.out), indent=2, default=str)[:2000])


if __name__ == "__main__":
    main()
