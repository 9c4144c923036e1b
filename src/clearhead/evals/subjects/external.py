"""Evaluating a model that was not trained here: any causal language model in a directory, a GGUF file or on the hub.

Its results lie in a run directory of one arm and one seed, so that the report reads them as it reads its own:

```
runs/NAME/recipe.toml   env.json   arms/ARM/seed-0/   subject.json  status.json  results/<evaluation>.json
```
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clearhead.data.hub import without_waiting
from clearhead.data.opening import NeedsCode, open_pretrained
from clearhead.data.store import TokenStore
from clearhead.evals.asking.texts import open_texts
from clearhead.evals.reasons import reason_of
from clearhead.evals.subject import Subject
from clearhead.evals.subjects.adapters import base_of, is_adapter, merged
from clearhead.evals.subjects.gguf import is_gguf, load_gguf, open_gguf
from clearhead.integrations.hf_attention import use_fused
from clearhead.runs.environment import environment
from clearhead.runs.files import write_json, write_text
from clearhead.runs.lock import RunError
from clearhead.runs.recipe_io import read_toml
from clearhead.runs.results import read_json, slugify
from clearhead.runs.status import Status, write_status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DEFAULT_SUITES = ("perplexity", "passkey")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ExternalSpec:
    """What is evaluated: a model's directory, GGUF file or hub id, and the text it is evaluated on."""

    model: str
    corpus: str = "stdlib"
    text_field: str = "text"

    @property
    def name(self) -> str:
        """The last part of the model's name, without the ending of a GGUF file."""
        path = Path(self.model)
        if is_gguf(self.model):
            return path.stem
        return (path.resolve() if path.is_dir() else path).name


def is_external(source: str) -> bool:
    """Whether `source` is a model and not a run or a job of this project."""
    path = Path(source)
    if is_gguf(source):
        return True
    if path.is_dir():
        ours = (path / "recipe.toml", path / "job.json", path.parent / "job.json")
        return ((path / "config.json").exists() and not any(file.exists() for file in ours)) or is_adapter(
            path
        )
    return not path.exists() and HUB_ID.fullmatch(source) is not None


def reopened(directory: Path) -> ExternalSpec | None:
    """What an earlier evaluation wrote into its run directory; None where there is none."""
    found = sorted(directory.glob("arms/*/seed-0/subject.json"))
    if not found:
        return None
    told = read_json(found[0])
    names = {field.name for field in fields(ExternalSpec)}
    if "model" not in told or not set(told) <= names or not all(isinstance(v, str) for v in told.values()):
        raise ValueError(
            f"{found[0]} does not say what was evaluated: it has {', '.join(map(str, told))}, expected "
            f"{', '.join(sorted(names))}; choose another --out"
        )
    return ExternalSpec(**told)


class ExternalLoader:
    """Loads model, tokenizer and text when an evaluation first needs them: what is finished costs nothing."""

    def __init__(self, spec: ExternalSpec, say: Callable[[str], None] | None = None) -> None:
        self.spec = spec
        self.say = say or (lambda message: None)
        self.folder: Path | None = None

    @property
    def base(self) -> str:
        """Where configuration and weights are: the model itself, or the one that an adapter changes."""
        return base_of(self.spec.model) if is_adapter(self.spec.model) else self.spec.model

    @cached_property
    def subject(self) -> Subject:
        """The model with what its own configuration tells of its training.

        Raises ValueError, in one sentence, when it cannot be loaded, is no decoder, or has no fast tokenizer.
        """
        from clearhead.models.tasks import task_of_model

        task = task_of_model(self.config)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load(task.auto_class, self.base, "the model")
        if is_adapter(self.spec.model):
            model = merged(model, self.spec.model)
        model = model.to(device).eval()
        use_fused(model)
        tokenizer = self.tokenizer
        rows = int(model.get_input_embeddings().weight.shape[0])
        if len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer of {self.spec.model!r} has {len(tokenizer)} tokens, its model {rows}: "
                "they do not belong together"
            )

        def untrained() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return task.auto_class.from_config(model.config).to(device).eval()  # type: ignore[no-any-return]

        def texts() -> TokenStore:
            self.say(f"reading {self.spec.corpus}")
            return open_texts([self.spec.corpus], tokenizer, text_field=self.spec.text_field)

        return Subject(
            model=model,
            tokenizer=tokenizer,
            open_documents=texts,
            device=device,
            untrained=untrained,
            seed=0,
            training_length=self.training_length,
            external=True,
            task=task.name,
            folder=self.folder,
        )

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        import clearhead.models  # noqa: F401

        found = load(AutoConfig, self.base, "the model")
        if found.is_encoder_decoder or not getattr(found, "causal", True):
            kind = "encoder-decoder" if found.is_encoder_decoder else "encoder"
            raise ValueError(
                f"{self.spec.model!r} is an {kind} ({found.model_type}); these evaluations read causal language models"
            )
        return found

    @cached_property
    def description(self) -> str:
        """What the report says was evaluated."""
        path = Path(self.spec.model)
        told = f"{self.spec.name if path.exists() else self.spec.model}, evaluated as it is."
        if is_adapter(path):
            return f"{self.spec.name}, an adapter, merged into {self.base}."
        return f"{told} {open_gguf(path).sentence()}" if is_gguf(self.spec.model) else told

    @property
    def training_length(self) -> int | None:
        """The length of training, before any rotary scaling stretched it, as far as the configuration says."""
        text = self.config.get_text_config()
        scaling = text.to_dict().get("rope_parameters") or {}
        return scaling.get("original_max_position_embeddings") or getattr(
            text, "max_position_embeddings", None
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's own tokenizer; where it has no bos token its eos token begins a text, which is said."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        own = not is_adapter(self.spec.model) or (Path(self.spec.model) / "tokenizer.json").exists()
        found = load(AutoTokenizer, self.spec.model if own else self.base, "the tokenizer")
        if not isinstance(found, PreTrainedTokenizerFast):
            raise ValueError(
                f"the tokenizer of {self.spec.model!r} has no fast version (tokenizer.json); convert it"
            )
        if found.bos_token_id is None:
            if found.eos_token is None:
                self.say("the tokenizer has neither bos nor eos: texts begin with nothing")
            else:
                self.say(
                    f"the tokenizer has no bos token: its eos token {found.eos_token!r} begins each text instead"
                )
                found.bos_token = found.eos_token
        return found


def load(kind: Any, source: str, what: str) -> Any:
    """`kind.from_pretrained(source)`; ValueError with the reason for anything that goes wrong on the way."""
    if is_gguf(source):
        return load_gguf(kind, Path(source), what)
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not Path(source).exists():
        without_waiting()
    try:
        # Weights in pickles are not read: they can run code.
        return open_pretrained(kind, source, **({"use_safetensors": True} if _has_weights(kind) else {}))
    except NeedsCode as error:
        raise ValueError(f"{what} {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise _unreachable(source, what, error) from error
    except (OSError, ValueError, KeyError) as error:
        if not Path(source).is_dir():
            raise _unreachable(source, what, error) from error
        raise ValueError(f"{what} in {source!r} cannot be loaded: {reason_of(error)}") from error


def _has_weights(kind: Any) -> bool:
    """Whether an Auto class is one of models, not of configurations or tokenizers."""
    return str(kind.__name__).startswith("AutoModel")


def _unreachable(source: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{what} {source!r} is neither a directory with a config.json nor a model that the Hugging Face hub gave "
        f"({reason_of(error)}); check the name and the network, or give a local directory"
    )


def open_external_run(directory: Path, loader: ExternalLoader, suites: list[str]) -> Path:
    """Make `directory` the run of a model from elsewhere, or go on with it; returns the directory of its job.

    Raises RunError when it belongs to something else: another model or text, or runs trained here.
    """
    import tomli_w

    spec, name = loader.spec, loader.spec.name
    job = directory / "arms" / slugify(name) / "seed-0"
    known = reopened(directory)
    if known is not None and known != spec:
        raise RunError(
            f"{str(directory)!r} has results of {known.model!r} on {known.corpus!r}, not of {spec.model!r} on "
            f"{spec.corpus!r}; choose another --out"
        )
    if (
        known is None
        and directory.exists()
        and any(e for e in directory.iterdir() if not e.name.startswith("."))
    ):
        raise RunError(
            f"{str(directory)!r} is not empty and not the run of a model from elsewhere; choose another --out"
        )
    earlier = directory / "recipe.toml"
    if earlier.exists():
        before = read_toml(earlier).get("evaluate", {}).get("suites", [])
        suites = list(dict.fromkeys([*before, *suites]))
    recipe: dict[str, Any] = {
        "name": name,
        "description": loader.description,
        "seeds": [0],
        "corpus": {"source": spec.corpus, "text_field": spec.text_field},
        "evaluate": {"suites": suites},
        "arms": [{"name": name, "attention": str(loader.config.model_type)}],
    }
    if loader.training_length is not None:
        recipe["data"] = {"length": loader.training_length}
    job.mkdir(parents=True, exist_ok=True)
    write_json(job / "subject.json", asdict(spec))
    write_text(directory / "recipe.toml", tomli_w.dumps(recipe))
    if not (directory / "env.json").exists():
        write_json(directory / "env.json", environment())
    write_status(job, Status("trained"))
    return job
