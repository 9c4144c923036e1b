"""A model card: what a model is, what it was trained on, what was measured, how to load it; made from files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clearhead.runs.card_file import CARD, CARD_MARK
from clearhead.runs.files import write_text
from clearhead.runs.results import RunResults, load_run, read_json, slugify

RECORD = "conversion.json"
OURS = ("clearhead", "clearhead_encoder", "clearhead_seq2seq")
"""Families of models of this library."""
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
"""What Hugging Face calls the use of a model, by the Auto class that loads it."""
WHAT = {
    "AutoModelForCausalLM": "A causal language model",
    "AutoModelForMaskedLM": "An encoder for masked tokens",
    "AutoModelForSequenceClassification": "A model that gives texts their labels",
    "AutoModelForSeq2SeqLM": "An encoder-decoder",
}
LICENCES = (("apache-2.0", "Apache License"), ("mit", "MIT License"), ("cc0-1.0", "CC0 1.0"))
SIZES = (
    ("layers", "num_hidden_layers"),
    ("width", "hidden_size"),
    ("inner width", "intermediate_size"),
    ("heads, counted as for the Transformer twin", "num_attention_heads"),
    ("key-value heads", "num_key_value_heads"),
    ("width of a head", "head_dim"),
    ("vocabulary", "vocab_size"),
    ("`max_position_embeddings`", "max_position_embeddings"),
)


def write_card(
    directory: Path, *, name: str | None = None, licence: str | None = None, replace: bool = False
) -> Path:
    """Write README.md beside a model's weights; returns its path.

    directory: a model's directory, or the job directory of a run that it is in.
    licence:   Hugging Face's name of it, such as "apache-2.0"; by default what a LICENSE file beside the model says.
    replace:   also replace a README.md that was not made here.
    Raises ValueError for a directory without a model and for a README.md of a person's own.
    """
    folder = next((d for d in (directory, directory / "model") if (d / "config.json").exists()), None)
    if folder is None:
        raise ValueError(f"{str(directory)!r} holds no model (no config.json)")
    target = folder / CARD
    if target.exists() and not replace and CARD_MARK not in target.read_text(encoding="utf-8"):
        raise ValueError(
            f"{str(target)!r} was not written by clearhead card; --replace writes over it, or move it away"
        )
    write_text(target, card(folder, name=name, licence=licence))
    return target


def card(folder: Path, *, name: str | None = None, licence: str | None = None) -> str:
    """The card's text."""
    config = read_json(folder / "config.json")
    job = read_json(folder.parent / "job.json") if folder.name == "model" else {}
    run = _run(folder) if job else None
    title = name or (f"{job['recipe']}: {job['arm']}" if job else folder.resolve().name)
    licence = licence or _licence(folder)
    parts = [
        _header(config, job, licence),
        f"{CARD_MARK}\n# {title}\n",
        _what(config, folder, job),
        _origin(read_json(folder / RECORD)),
        _data(job, run),
        _recipe(job),
        _results(job, run),
        _loading(config),
        _licence_section(licence),
    ]
    return "\n".join(part for part in parts if part)


def _header(config: Mapping[str, Any], job: Mapping[str, Any], licence: str | None) -> str:
    """Hugging Face's YAML; strings as JSON, which YAML reads."""
    ours = config.get("model_type") in OURS
    pipeline = PIPELINES[_auto(config)]
    tags = ["clearhead", pipeline]
    attention = _attention(config)
    tags += [tag for tag in (attention.replace("_", "-"),) if tag != "softmax"]
    sets = [source.removeprefix("hf:") for source, _ in _sources(job) if source.startswith("hf:")]
    lines = [
        "---",
        f"library_name: {'clearhead' if ours else 'transformers'}",
        f"pipeline_tag: {pipeline}",
        f"tags: {json.dumps(tags)}",
    ]
    if licence:
        lines.insert(1, f"license: {json.dumps(licence)}")
    if sets:
        lines.append(f"datasets: {json.dumps(sets)}")
    return "\n".join([*lines, "---", ""])


def _auto(config: Mapping[str, Any]) -> str:
    """The Auto class that loads the model: what `auto_map` says, or the one for causal language models."""
    saved = (config.get("architectures") or [""])[0]
    named = {str(target).rpartition(".")[2]: auto for auto, target in (config.get("auto_map") or {}).items()}
    found = named.get(saved, "AutoModelForCausalLM")
    return found if found in PIPELINES else "AutoModelForCausalLM"


def _attention(config: Mapping[str, Any]) -> str:
    if config.get("model_type") in OURS:
        return str(config.get("attention", config.get("decoder", {}).get("attention", "softmax")))
    return "differential" if config.get("model_type") == "diffllama" else "softmax"


def _what(config: Mapping[str, Any], folder: Path, job: Mapping[str, Any]) -> str:
    described = {
        "softmax": "the Transformer's attention",
        "differential": "differential attention V1 (arXiv 2410.05258): softmax(q₁k₁ᵀ) − λ softmax(q₂k₂ᵀ)",
        "differential_v2": "differential attention V2 (Microsoft, January 2026)",
        "collinear": "Collinear Constrained Attention (CoCA, arXiv 2309.08646)",
        "differential_collinear": "differential attention V1 with collinear streams",
        "differential_v2_collinear": "differential attention V2 with collinear streams",
    }
    # An encoder-decoder's keys are its sides'; what is said is the decoder's, as `config.attention` is.
    config = {**(config.get("decoder") or {}), **config}
    attention = _attention(config)
    patterns = config.get("layers") or [{}]
    kinds = dict.fromkeys(entry.get("attention", attention) for entry in patterns)
    mechanisms = " and ".join(described.get(kind, kind) for kind in kinds)
    if len(kinds) > 1:
        mechanisms += " in layers that differ"
    options = ", ".join(f"{key} {value}" for key, value in (config.get("attention_options") or {}).items())
    rope = config.get("rope_parameters") or {}
    positions = str(config.get("position", "rope"))
    if positions == "rope" and rope:
        positions = f"RoPE ({rope.get('rope_type', 'default')}, base {rope.get('rope_theta', 10000.0):g})"
    rows = [("parameters", f"{_parameters(folder):,}")] if list(folder.glob("*.safetensors")) else []
    sizes = {**config, **(config.get("twin_heads") or {})}
    rows += [(label, f"{sizes[key]:,}") for label, key in SIZES if isinstance(sizes.get(key), int)]
    windows = [str(e.get("sliding_window", config.get("sliding_window")) or "all") for e in patterns]
    if set(windows) != {"all"}:
        repeated = ", repeated over the depth" if len(windows) > 1 else ""
        rows.append(("tokens that a layer sees", f"{', '.join(windows)}{repeated}"))
    if job:
        rows.append(("tokens of a row in training", f"{job['data']['length']:,}"))
    rows += [("positions", positions), ("stored in", str(config.get("dtype", "float32")))]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return (
        f"{WHAT[_auto(config)]} with {mechanisms}{f' ({options})' if options else ''}, "
        f"otherwise as LLaMA (pre-RMSNorm, SwiGLU, no biases).\n\n| | |\n|---|---|\n{table}\n"
    )


def _parameters(folder: Path) -> int:
    from clearhead.convert.weights import FileWeights

    weights = FileWeights(sorted(folder.glob("*.safetensors")))
    total = 0
    for name in weights.names():
        numbers = 1
        for length in weights.shape(name):
            numbers *= length
        total += numbers
    return total


def _origin(record: Mapping[str, Any]) -> str:
    if not record:
        return ""
    source, check = record["source"], record["check"]
    kept = (
        f"It is the same function: the largest difference of logits on a text is {check['max_difference']:.2g}, "
        f"computed in {check['computed_in']}."
        if record["same_function"]
        else f"The attention was changed from {source['attention']} to {record['result']['attention']}: these weights "
        "are a start for training, not the source's function."
    )
    note = f" {source['note']}" if "note" in source else ""
    return f"## Where it comes from\n\nConverted from `{source['name']}` ({source['format']}).{note} {kept}\n"


def _data(job: Mapping[str, Any], run: RunResults | None) -> str:
    if not job:
        return "## Data\n\nNot recorded here.\n"
    corpus, data = job["corpus"], job["data"]
    sources = _sources(job)
    each = [
        _named(source) + (f" ({part:.1%} of the rows)" if len(sources) > 1 else "")
        for source, part in sources
    ]
    named = " and ".join(filter(None, (", ".join(each[:-1]), each[-1])))
    shares = [
        f"{share:.0%} {what}"
        for share, what in (
            (1 - data["needle_share"] - data["pair_share"], "text"),
            (data["needle_share"], "texts with facts to look up"),
            (data["pair_share"], "shuffled pairs"),
        )
        if share
    ]
    if examples := data.get("examples", {}).get("source"):
        folds = data["examples"]["folds"]
        return (
            f"## Data\n\n{_named(examples)}, in rows of {data['length']} tokens; one of {folds} folds was held out. "
            f"The tokenizer was made from, or chosen for, {named}.\n"
        )
    return (
        f"## Data\n\n{named[0].upper() + named[1:]}, in rows of {data['length']} tokens: {', '.join(shares)}. "
        f"{corpus['validation_fraction']:.0%} of the documents were held out.\n"
    )


def _sources(job: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The texts of a job's corpus with their parts of the rows."""
    corpus = job.get("corpus", {})
    several = corpus.get("sources") or [{"source": corpus.get("source", ""), "weight": 1.0}]
    total = sum(one["weight"] for one in several)
    return [(one["source"], one["weight"] / total) for one in several]


def _named(source: str) -> str:
    """A corpus without the directories of the machine that it was on."""
    if source == "stdlib":
        return "the sources of Python's standard library"
    return f"`{source if source.startswith('hf:') else Path(source).name}`"


def _model_named(start: str) -> str:
    """A model of a run from the run's name on, any other by its last name: nothing of the machine that it was on."""
    parts = Path(start).parts
    run = parts.index("arms") - 1 if "arms" in parts[1:] else len(parts) - 1
    return "/".join(parts[run:])


def _recipe(job: Mapping[str, Any]) -> str:
    if not job:
        return ""
    train = job["train"]
    start = job.get("start")
    began = f"It began with the weights of `{_model_named(start)}`. " if start else ""
    return (
        f"## Recipe\n\n{began}{train['tokens']:,} tokens in batches of {train['batch_tokens']:,}; AdamW, learning rate "
        f"{train['learning_rate']:g} ({train['schedule']}, warm-up {train['warmup']:.0%}), weight decay "
        f"{train['weight_decay']:g}, betas {train['betas'][0]:g} and {train['betas'][1]:g}, gradients clipped at "
        f"{train['grad_clip']:g}; seed {job['seed']}. Made by `clearhead compare` or `clearhead train`.\n"
    )


def _results(job: Mapping[str, Any], run: RunResults | None) -> str:
    if run is None:
        return "## Results\n\nNone are recorded here; `clearhead evaluate` measures them.\n"
    from clearhead.report.build import cell, evaluation_sections

    rows = []
    for section in evaluation_sections(run):
        for headline in section.headlines:
            if headline.arm == job["arm"] and section.measure:
                seeds = headline.estimate.seeds if headline.estimate else None
                number = headline.estimate.n if headline.estimate else None
                rows.append(
                    f"| {section.measure} | {cell(headline, section.digits)} | {number or '–'} | {seeds or '–'} |"
                )
    if not rows:
        return "## Results\n\nNothing has been measured yet.\n"
    table = "\n".join(rows)
    return (
        "## Results\n\nOf this arm over its seeds, with 95 % intervals; n is the number of items.\n\n"
        f"| measure | value (interval) | n | seeds |\n|---|---|---|---|\n{table}\n"
    )


def _run(folder: Path) -> RunResults | None:
    """The run of a model that lies in arms/ARM/seed-N/model."""
    root = folder.resolve().parents[3] if len(folder.resolve().parents) > 3 else None
    if root is None or not (root / "recipe.toml").exists():
        return None
    found = load_run(root)
    slug = folder.resolve().parent.parent.name
    return found if any(slugify(arm.name) == slug for arm in found.arms) else None


def _loading(config: Mapping[str, Any]) -> str:
    ours, auto = config.get("model_type") in OURS, _auto(config)
    note = "`pip install clearhead`, then:" if ours else "With transformers alone:"
    trust = ", trust_remote_code=True" if ours else ""
    after = (
        "\n`trust_remote_code=True` imports the installed package and nothing else; after `import clearhead.models` it "
        "is not needed.\n"
        if ours
        else ""
    )
    return (
        f"## How to load it\n\n{note}\n\n```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("PATH_OR_HUB_ID"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID")\n```\n{after}'
    )


def _licence(folder: Path) -> str | None:
    for file in sorted(folder.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")[:500]
        for name, words in LICENCES:
            if re.search(words, text):
                return name
        return "other"
    return None


def _licence_section(licence: str | None) -> str:
    stated = (
        f"{licence}."
        if licence
        else "None was stated: say which one with `clearhead card --license`, with regard to data and source."
    )
    return f"## Licence\n\n{stated}\n"
