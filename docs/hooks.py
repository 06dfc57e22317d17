"""What mkdocs takes into the site from elsewhere in the repository.

README's benchmark tables and the machines' pages: committed, and made from the
JSON results by `python -m benchmarks.publish`.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_REPO = Path(__file__).resolve().parents[1]
_RESULTS = _REPO / "benchmarks" / "results"
_MARK = "<!-- benchmarks -->"
_BLOCK = re.compile(rf"{_MARK}\n(.*?)<!-- end of benchmarks -->", re.DOTALL)
_LINK = re.compile(r"\(benchmarks/results/([^/)]+)/README\.md\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each machine's page and its pictures as machines/<machine>/."""
    for path in sorted(_RESULTS.glob("*/*")):
        if path.name == "README.md" or path.suffix == ".png":
            name = f"machines/{path.parent.name}/{path.name}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Put README's tables where a page has the mark for them."""
    if _MARK not in markdown:
        return markdown
    found = _BLOCK.search((_REPO / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"README.md has no {_MARK} for {page.file.src_uri}")
    tables = _LINK.sub(r"(machines/\1/README.md)", found[1])
    return markdown.replace(_MARK, tables)
