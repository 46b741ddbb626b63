"""ABBA beside its peers: step time, peak memory and bytes kept for backward, measured side by side on this machine.

    python benchmarks/run.py [--device cpu|cuda] [--grid headline|tokens|ranks|shapes|all|smoke] [--rounds 5] [--out DIR]

See docs/benchmarks.md for what is measured and how to read it. Run the same command again to go on after an interruption.
"""

import sys

# Run as a script, Python finds the package beside this file; mypy knows it as benchmarks.side_by_side.
from side_by_side.running import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    sys.exit(main())
