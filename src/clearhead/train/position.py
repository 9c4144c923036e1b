"""Where in the stream of rows a checkpoint stands, and whether it is where training goes on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.data.began import data_fingerprint
from clearhead.data.retrieval import Mixture
from clearhead.data.streamed import MixedRows
from clearhead.data.writing import replacing
from clearhead.models.tasks import TrainingRows
from clearhead.train.callbacks import TrainingError

POSITION = "position.json"


@dataclass(frozen=True)
class Stream:
    """The rows of a training in their one order, which all its processes share.

    rows_per_step: of all processes together, so that a position does not depend on how many there are.
    """

    rows: TrainingRows
    rows_per_step: int
    length: int
    identity: Mapping[str, Any]

    def position(self, step: int) -> dict[str, Any]:
        """What is behind a training of `step` steps: rows, tokens, and of streamed text how far each source is read."""
        count = step * self.rows_per_step
        return {
            "rows": count,
            "tokens": count * self.length,
            "sources": self._sources(count),
            "data": data_fingerprint(self.identity),
        }

    def _sources(self, count: int) -> dict[str, dict[str, int]]:
        text = getattr(self.rows, "text", None)
        if not isinstance(text, MixedRows):
            return {}
        return text.position(self.rows.text_before(count) if isinstance(self.rows, Mixture) else count)

    def save(self, checkpoint: Path, step: int) -> None:
        """Write the position into a checkpoint."""
        with replacing(checkpoint / POSITION) as part:
            part.write_text(json.dumps(self.position(step), indent=1), encoding="utf-8")

    def check(self, checkpoint: Path, step: int) -> None:
        """TrainingError unless training goes on at the row, and with the data, that the checkpoint says.

        A checkpoint that says neither was written before they did.
        """
        try:
            found = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        here = self.position(step)
        for key, what in (
            ("data", "text, tokenizer or mixture"),
            ("rows", "number of rows"),
            ("tokens", "length"),
        ):
            if found.get(key) != here[key]:
                raise TrainingError(
                    f"{str(checkpoint / POSITION)!r}: the checkpoint stands behind row {found.get('rows')} of other "
                    f"data: its {what} ({key}) is {found.get(key)!r}, here {here[key]!r}; put back what it was, or "
                    "begin again in another run directory"
                )
