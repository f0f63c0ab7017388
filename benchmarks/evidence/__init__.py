"""What DropConnect is good for: several seeds, paired differences, whatever they say.

    python -m benchmarks.evidence labels        # or paper, ...; all of them: make evidence
    python -m benchmarks.evidence labels --seeds 10 --device cuda

Each training is a unit, whose result is a line of `results/<experiment>.jsonl` once it is there. A
command does the units that are missing, seed by seed, so it goes on where it was stopped, and more
seeds are more of the same. `docs/evidence.md` shows the tables of what is complete.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # their data, networks and statistics are used here
