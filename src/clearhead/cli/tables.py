"""Tables of results: whole where there is no terminal, and in one wrapped between words, so that no number is cut."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

# As wide as a table may become in a file or a pipe.
_ENDLESS = 100_000


def results_console(*, stderr: bool = False) -> Console:
    """For results: in a file or a pipe lines are as long as they are."""
    console = Console(highlight=False, soft_wrap=True, stderr=stderr)
    if not console.is_terminal:
        console.width = _ENDLESS
    return console


class WholeTable(Table):
    """A table that never elides: where a line is too short for its columns, they follow in further tables below.

    columns: their titles, the first `left` of them flush left, the others, numbers mostly, flush right.
    """

    def __init__(self, *columns: str, left: int = 1, title: str | None = None) -> None:
        super().__init__(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(columns):
            self.add_column(name, justify="left" if index < left else "right")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self._parts(console, options):
            yield from part.__rich_console__(console, options)

    def _parts(self, console: Console, options: ConsoleOptions) -> list[Table]:
        """Tables that fit; the first column, which says what a line is about, in each of them."""
        room = options.max_width
        widest = [_width(column, console, str.splitlines) for column in self.columns]
        least = [_width(column, console, str.split) for column in self.columns]

        def fits(chosen: Sequence[int], widths: Sequence[int]) -> bool:
            part = self._of(chosen, widths)
            return part.__rich_measure__(console, options.update_width(_ENDLESS)).maximum <= room

        everything = list(range(len(self.columns)))
        if fits(everything, widest):
            return [self._of(everything, widest)]
        blocks = [[0]]
        for index in everything[1:]:
            if len(blocks[-1]) > 1 and not fits([*blocks[-1], index], least):
                blocks.append([0])
            blocks[-1].append(index)
        return [
            self._of(block, _grown(block, least, widest, fits), first=not number)
            for number, block in enumerate(blocks)
        ]

    def _of(self, chosen: Sequence[int], widths: Sequence[int], first: bool = True) -> Table:
        part = Table(title=self.title if first else None, title_justify="left", box=self.box)
        part.columns = [
            replace(self.columns[index], _index=place, width=widths[index], overflow="fold", no_wrap=False)
            for place, index in enumerate(chosen)
        ]
        part.rows, part.show_header = self.rows, self.show_header
        return part


def _grown(
    chosen: Sequence[int],
    least: Sequence[int],
    widest: Sequence[int],
    fits: Callable[[Sequence[int], Sequence[int]], bool],
) -> list[int]:
    """Widths between `least` and `widest` that fill a line: what is squeezed most grows first."""
    widths = list(least)
    # Names are folded if nothing else helps; numbers keep their width.
    while widths[0] > 1 and not fits(chosen, widths):
        widths[0] -= 1
    while True:
        index = max(chosen, key=lambda index: widest[index] - widths[index])
        if widths[index] >= widest[index]:
            return widths
        widths[index] += 1
        if not fits(chosen, widths):
            widths[index] -= 1
            return widths


def _width(column: Column, console: Console, pieces: Callable[[str], list[str]]) -> int:
    """Of the widest piece of a column's title and cells."""
    cells = [column.header, *column.cells]
    plain = [cell.plain if isinstance(cell, Text) else console.render_str(str(cell)).plain for cell in cells]
    return max([1, *(cell_len(piece) for text in plain for piece in pieces(text))])
