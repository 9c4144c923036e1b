"""Every public name has its place in the reference, and every page its place in the site."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import clearhead

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {
    name: page.stem
    for page in (DOCS / "api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
}


def resolved(name: str) -> object:
    """The object of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("module", clearhead.__all__)
def test_every_public_name_has_its_page(module: str) -> None:
    named = getattr(clearhead, module)
    if callable(named):
        assert f"{named.__module__}.{module}" in SHOWN, f"docs/api has no ::: {named.__module__}.{module}"
        return
    public = import_module(f"clearhead.{module}").__all__
    missing = [
        name
        for name in public
        if f"clearhead.{module}.{name}" not in SHOWN
        and not any(shown.startswith(f"clearhead.{module}.{name}.") for shown in SHOWN)
    ]
    assert not missing, f"docs/api has no ::: clearhead.{module}.{missing[0]}"


def test_what_the_reference_shows_exists_and_is_described() -> None:
    for name in SHOWN:
        found = resolved(name)
        assert isinstance(found, tuple) or (found.__doc__ or "").strip(), f"{name} has no docstring"


def test_every_page_is_in_the_site() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text.partition("\nnav:\n")[2]))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert listed == pages
