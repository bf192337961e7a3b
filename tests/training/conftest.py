"""The example package is importable in the tests of runs."""

import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_package"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))
