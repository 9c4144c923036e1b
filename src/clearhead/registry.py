"""Everything that can be chosen by name, in one literal table.

A variant, position, rope scaling, engine, kernel, evaluation, judge or converter is one new file and one line here.
Third parties add theirs through entry points in the groups `clearhead.variants`, `clearhead.positions`,
`clearhead.rope_scalings`, `clearhead.engines`, `clearhead.kernels`, `clearhead.evaluations`, `clearhead.judges` and
`clearhead.converters`. Nothing is imported until it is asked for.
"""

import difflib
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

VARIANTS = {
    "softmax": "clearhead.variants.softmax:Softmax",
    "differential": "clearhead.variants.differential:Differential",
    "differential_v2": "clearhead.variants.differential_v2:DifferentialV2",
    "collinear": "clearhead.variants.collinear:Collinear",
    "differential_collinear": "clearhead.variants.differential_collinear:DifferentialCollinear",
    "differential_v2_collinear": "clearhead.variants.differential_collinear:DifferentialV2Collinear",
    "dex": "clearhead.variants.dex:Dex",
    "diff_lora": "clearhead.variants.diff_lora:DiffLora",
}
POSITIONS = {
    "rope": "clearhead.positions.rope:Rope",
    "xpos": "clearhead.positions.xpos:Xpos",
    "alibi": "clearhead.positions.alibi:Alibi",
    "nope": "clearhead.positions.nope:Nope",
}
ROPE_SCALINGS = {
    "default": "clearhead.positions.scaling.default:DefaultScaling",
    "linear": "clearhead.positions.scaling.linear:LinearScaling",
    "ntk": "clearhead.positions.scaling.ntk:NtkScaling",
    "dynamic": "clearhead.positions.scaling.dynamic:DynamicScaling",
    "yarn": "clearhead.positions.scaling.yarn:YarnScaling",
    "llama3": "clearhead.positions.scaling.llama3:Llama3Scaling",
    "longrope": "clearhead.positions.scaling.longrope:LongRopeScaling",
}
ENGINES = {
    "sdpa": "clearhead.engines.sdpa:Sdpa",
    "flex": "clearhead.engines.flex:Flex",
    "eager": "clearhead.engines.eager:Eager",
}
KERNELS = {
    "cpu": "clearhead.kernels.cpu.kernel:Cpu",
    "triton": "clearhead.kernels.triton.kernel:Triton",
    "blocks": "clearhead.kernels.blocks:Blocks",
}
# Modules that make backends for names outside ENGINES and KERNELS, imported when such a name is asked for.
BACKEND_FACTORIES = ("clearhead.engines.hf",)
EVALUATIONS = {
    "language_modelling": "clearhead.evals.text.language_modelling:LanguageModelling",
    "masked_language_modelling": "clearhead.evals.text.masked_language_modelling:MaskedLanguageModelling",
    "masked_by_length": "clearhead.evals.text.masked_by_length:MaskedByLength",
    "target_modelling": "clearhead.evals.text.target_modelling:TargetModelling",
    "classification": "clearhead.evals.text.classification:Classification",
    "loss_by_position": "clearhead.evals.text.loss_by_position:LossByPosition",
    "needles": "clearhead.evals.retrieval.needles:Needles",
    "allocation": "clearhead.evals.internals.allocation:Allocation",
    "mastery": "clearhead.evals.retrieval.mastery:Mastery",
    "perplexity": "clearhead.evals.text.perplexity.evaluation:Perplexity",
    "passkey": "clearhead.evals.retrieval.passkey.evaluation:Passkey",
    "multi_needle": "clearhead.evals.retrieval.multi_needle.evaluation:MultiNeedle",
    "many_shot": "clearhead.evals.in_context.many_shot.evaluation:ManyShot",
    "order_robustness": "clearhead.evals.in_context.order_robustness.evaluation:OrderRobustness",
    "lm_eval": "clearhead.evals.external.lm_eval:LmEval",
    "scaling_factors": "clearhead.evals.composed.scaling_factors:ScalingFactors",
    "logit_outliers": "clearhead.evals.internals.logit_outliers:LogitOutliers",
    "anomalous_cases": "clearhead.evals.internals.anomalous_cases:AnomalousCases",
    "answer_attention": "clearhead.evals.internals.answer_attention:AnswerAttention",
    "initial_angles": "clearhead.evals.internals.initial_angles:InitialAngles",
    "activation_outliers": "clearhead.evals.internals.activation_outliers:ActivationOutliers",
    "quantisation": "clearhead.evals.internals.quantisation:Quantisation",
    "memory": "clearhead.evals.internals.memory.evaluation:Memory",
    "ar_hit": "clearhead.evals.text.ar_hit:ArHit",
    "generations": "clearhead.evals.text.generations:Generations",
    "kept": "clearhead.evals.text.kept:Kept",
    "knowledge_conflicts": "clearhead.evals.faithfulness.knowledge_conflicts.evaluation:KnowledgeConflicts",
    "long_document_qa": "clearhead.evals.faithfulness.long_document_qa.evaluation:LongDocumentQa",
    "hallucination": "clearhead.evals.faithfulness.hallucination.evaluation:Hallucination",
}
JUDGES = {
    "openai": "clearhead.evals.faithfulness.judges.endpoint:Endpoint",
    "local": "clearhead.evals.faithfulness.judges.local:Local",
    "nli": "clearhead.evals.faithfulness.judges.nli:Nli",
}
# The first that claims a source takes it.
CONVERTERS = {
    "serving": "clearhead.convert.serving:Serving",
    "clearhead": "clearhead.convert.own:Clearhead",
    "microsoft_v1": "clearhead.convert.microsoft:MicrosoftV1",
    "microsoft_v2": "clearhead.convert.microsoft:MicrosoftV2",
    "coca": "clearhead.convert.coca:CocaLlama",
    "coca_neox": "clearhead.convert.coca:CocaNeox",
    "diff_llama": "clearhead.convert.diff_llama:DiffLlama",
    "llama": "clearhead.convert.llama:Llama",
    "mistral": "clearhead.convert.llama:Mistral",
    "qwen2": "clearhead.convert.qwen:Qwen2",
    "qwen3": "clearhead.convert.qwen:Qwen3",
}

_TABLES = {
    "variants": VARIANTS,
    "positions": POSITIONS,
    "rope_scalings": ROPE_SCALINGS,
    "engines": ENGINES,
    "kernels": KERNELS,
    "evaluations": EVALUATIONS,
    "judges": JUDGES,
    "converters": CONVERTERS,
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error about the unknown `name`: the nearest known name if there is one, else all of them."""
    known = sorted(known)
    # A beginning is what people type who do not remember the rest.
    near = difflib.get_close_matches(name, known, n=1) or sorted(
        (one for one in known if len(name) > 2 and one.startswith(name)), key=len
    )
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "none is registered"


# Not functools.cache: `torch.compile` looks inside it, and the search for entry points cannot be traced.
_installed: dict[str, dict[str, str]] = {}


def _entry_points(table: str) -> dict[str, str]:
    if table not in _installed:
        _installed[table] = {point.name: point.value for point in entry_points(group=f"clearhead.{table}")}
    return _installed[table]


def _targets(table: str) -> dict[str, str]:
    # A name of the project's own cannot be taken over by an installed package.
    return {**_entry_points(table), **_TABLES[table]}


def names(table: str) -> tuple[str, ...]:
    """The names in `table` ("variants", "positions", "rope_scalings", "engines", ...), the project's own first."""
    own = _TABLES[table]
    return (*own, *(name for name in _entry_points(table) if name not in own))


def resolve(table: str, name: str) -> Any:
    """Import and return what `name` stands for in `table`.

    Raises ValueError for a name that is not registered, with the nearest one that is.
    """
    targets = _targets(table)
    if name not in targets:
        raise ValueError(f"unknown {table.removesuffix('s')} {name!r}: {did_you_mean(name, targets)}")
    module, _, attribute = targets[name].partition(":")
    return getattr(import_module(module), attribute)
