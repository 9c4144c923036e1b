"""Files of the repository that a page links to become files of the site, so that it is whole without a network."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def outside(page: Path, target: str) -> Path | None:
    """The linked file, from the repository's root, where it is not one of the site's own."""
    found = (page.parent / target).resolve()
    if not found.is_file() or DOCS in found.parents or ROOT not in found.parents:
        return None
    return found.relative_to(ROOT)


def place(file: Path) -> str:
    """Where it lies in the site; Markdown would be made into a page, so it is shown as text."""
    return f"source/{file.as_posix()}" + (".txt" if file.suffix == ".md" else "")


def on_files(files: Files, config: Any) -> Files:
    linked = set()
    for page in DOCS.rglob("*.md"):
        for _, target in LINK.findall(page.read_text(encoding="utf-8")):
            linked.add(outside(page, target))
    for file in sorted(linked - {None}):
        files.append(File.generated(config, place(file), abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    path = Path(page.file.abs_src_path)
    up = "../" * (len(path.relative_to(DOCS).parts) - 1)

    def replaced(match: re.Match[str]) -> str:
        file = outside(path, match[2])
        return match[0] if file is None else f"{match[1]}{up}{place(file)}"

    return LINK.sub(replaced, markdown)


REMOTE = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="?https?:[^>]*>|<link[^>]*\srel="?stylesheet[^>]*https?:[^>]*>'
)


def on_post_build(config: Any) -> None:
    """A page that loads something from elsewhere breaks where there is no network, and tells others who reads it."""
    for page in Path(config["site_dir"]).rglob("*.html"):
        found = REMOTE.search(page.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{page.name} loads something from elsewhere: {found[0]}")
