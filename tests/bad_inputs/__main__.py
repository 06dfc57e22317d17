"""Write docs/errors.md: `python -m tests.bad_inputs`."""

import tempfile
from pathlib import Path

from mvat.files import write_text
from tests.bad_inputs import Bench, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_text(PAGE, page(Bench(folder).run))
    print(PAGE)
