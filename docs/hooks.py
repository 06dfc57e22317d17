"""What mkdocs takes into the site from elsewhere in the repository: README's benchmark tables and the machines' pages.

All of it is committed, made from the JSON results by `python -m benchmarks.publish`.
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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each machine's page and its pictures under machines/."""
    for path in sorted([*_RESULTS.glob("*/README.md"), *_RESULTS.glob("*/*.png")]):
        name = f"machines/{path.parent.name}" + (".md" if path.suffix == ".md" else f"/{path.name}")
        if path.suffix == ".md":
            # Pictures lie in the folder of the machine, beside its page.
            text = path.read_text(encoding="utf-8").replace("](", f"]({path.parent.name}/")
            files.append(File.generated(config, name, content=text))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put README's tables where a page has the mark for them."""
    if _MARK not in markdown:
        return markdown
    found = _BLOCK.search((_REPO / "README.md").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"README.md has no {_MARK} ... for {page.file.src_uri}")
    tables = re.sub(r"\(benchmarks/results/([^/)]+)/README\.md\)", r"(machines/\1.md)", found[1])
    return markdown.replace(_MARK, tables)
