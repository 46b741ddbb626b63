"""The forecast of memory for models of 8B, 70B and 123B under every strategy. On paper: nothing of it has been run.

    python benchmarks/forecast_table.py

The figures are the program's own forecast (`abba train --dry-run`) on the models' shapes, without weights: r1 = r2 = 16 on all
linear layers of the blocks, bfloat16 and nf4, one row of 2,048 tokens, gradient checkpointing, 8 devices to a machine. Prints the
two tables of docs/scale.md, and writes forecast-table.json under benchmarks/results.
"""

# Run as a script, Python finds the package beside this file; mypy knows it as benchmarks.scaling.
from scaling.memory import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    main(__doc__)
