"""One measured case as a table."""

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from clearhead.bench.cases import GenerateCase
from clearhead.bench.measure import Spread
from clearhead.bench.outcome import MeasuredCase, MeasuredPeer
from clearhead.cli.tables import WholeTable


def render(outcome: MeasuredCase) -> RenderableType:
    """The peers of a case, or what its gate found wrong."""
    case = outcome.case
    title = Text.assemble((case.name, "bold"), f"  {case.title}")
    if outcome.red:
        lines = [Text(f"  {line}", style="red") for line in outcome.red]
        return Group(title, Text("failed its check against float64, not timed:", style="red"), *lines)
    if isinstance(case, GenerateCase):
        return Group(title, _generate_table(outcome), _generate_footer(outcome), *_notes(outcome))
    memory = all(row.seconds is None for row in outcome.rows) and any(row.extra_bytes for row in outcome.rows)
    table = _memory_table(outcome) if memory else _time_table(outcome)
    return Group(title, table, *([] if memory else [_footer(outcome)]), *_notes(outcome))


def _notes(outcome: MeasuredCase) -> list[Text]:
    notes = [Text(f"  {row.peer}: {row.reason}", style="dim") for row in outcome.rows if row.reason]
    if outcome.interrupted:
        done = "" if isinstance(outcome.case, GenerateCase) else f" after {outcome.rounds} complete rounds"
        notes.append(Text(f"  interrupted{done}", style="yellow"))
    return notes


def _time_table(outcome: MeasuredCase) -> WholeTable:
    decoding = any(row.reads for row in outcome.rows)
    unit, scale = _unit(outcome)
    table = WholeTable("peer", "median ms", "quartiles", "min", "time over the first's", unit)
    if decoding:
        table.add_column("over reading K, V", justify="right")
    for row in outcome.rows:
        if row.seconds is None:
            table.add_row(escape(row.peer), *(["–"] * (len(table.columns) - 1)), style="dim")
            continue
        cells = [
            _ms(row.seconds.median),
            f"{_ms(row.seconds.q1)} to {_ms(row.seconds.q3)}",
            _ms(row.seconds.least),
            _ratio(row.ratio),
            _rate(row, outcome.matrix, scale),
        ]
        if decoding:
            cells.append(_ratio(row.reads))
        table.add_row(escape(row.peer), *cells)
    return table


def _memory_table(outcome: MeasuredCase) -> WholeTable:
    table = WholeTable("peer", "peak beyond inputs, MB", "over the first's")
    for row in outcome.rows:
        size = "–" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:,.0f}"
        ratio = "–" if row.ratio is None else f"{row.ratio.median:.2f}"
        table.add_row(escape(row.peer), size, ratio, style="dim" if row.extra_bytes is None else None)
    return table


def _generate_table(outcome: MeasuredCase) -> WholeTable:
    table = WholeTable(
        "peer",
        "first token ms",
        "over the first's",
        "ms a token",
        "tokens/s",
        "over the first's",
        "own time, over the first's",
        "cache MB",
        "peak MB",
    )
    for row in outcome.rows:
        if row.seconds is None or row.generation is None:
            table.add_row(escape(row.peer), *(["–"] * (len(table.columns) - 1)), style="dim")
            continue
        found = row.generation
        table.add_row(
            escape(row.peer),
            "–" if found.first is None else _ms(found.first.median),
            _ratio(found.first_ratio),
            _ms(row.seconds.median),
            f"{found.tokens_a_second:.3g}",
            _ratio(row.ratio),
            _ratio(found.processor_ratio),
            f"{found.cache_bytes / 1e6:,.3g}",
            "–" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:,.0f}",
        )
    return table


def _generate_footer(outcome: MeasuredCase) -> Text:
    assert isinstance(outcome.case, GenerateCase)
    prompts = outcome.case.prefills
    text = f"  {outcome.rounds} token{'s' * (outcome.rounds != 1)} of each beside the first's, prompts read {prompts}"
    return Text(f"{text} time{'s' * (prompts != 1)}; own time: of the process, not of the wall", style="dim")


def _ms(seconds: float) -> str:
    found = seconds * 1e3
    return f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"


def _ratio(ratio: Spread | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})"


def _unit(outcome: MeasuredCase) -> tuple[str, float]:
    """What operations a second are counted in, and how many that is."""
    return ("GFLOP/s", 1e9) if outcome.case.device == "cpu" else ("TFLOP/s", 1e12)


def _rate(row: MeasuredPeer, matrix: float | None, scale: float) -> str:
    assert row.rate is not None and matrix is not None
    return f"{row.rate / scale:.3g} ({row.rate / matrix:.0%})"


def _footer(outcome: MeasuredCase) -> Text:
    """What the table's last columns are measured against."""
    assert outcome.matrix is not None
    plural = "s" * (outcome.rounds != 1)
    unit, scale = _unit(outcome)
    text = f"  {outcome.rounds} round{plural}; torch.mm reaches {outcome.matrix / scale:.0f} {unit}"
    text += f" in {outcome.case.dtype}"
    if outcome.copy is not None:
        text += f"; copying as many bytes as K and V have moves {outcome.copy / 1e9:.1f} GB/s"
    return Text(text, style="dim")
