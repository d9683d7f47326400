"""What experiments do beside training: tell how far they are, and keep what they found."""

import json
import sys
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Tell what is being done, beside what is printed at the end."""
    print(text, file=sys.stderr, flush=True)


def keep(result: dict[str, Any], out: str) -> Path:
    """Write results.json to a folder, which is made. Returns the folder, for figures."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=2))
    return folder
