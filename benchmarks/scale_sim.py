"""What a step and a run take on 1 to 64 devices: simulated from counted operations and bytes, measured rates, and assumptions.

    python benchmarks/scale_sim.py [--tflops 400] [--threads 8] [--rows 1000000]

Nothing of it has been run on a card. An optimizer step is 64 sequences of 2,048 tokens whatever the number of devices, 8 to a
machine, with gradient checkpointing, r1 = r2 = 16 on all linear layers. Which figures are measured and which assumed stands in
docs/scale.md and at their definitions. Prints tables; writes scale-sim.json and scale-sim.png under benchmarks/results.
"""

# Run as a script, Python finds the package beside this file; mypy knows it as benchmarks.scaling.
from scaling.simulation import main  # type: ignore[import-not-found]

if __name__ == "__main__":
    main(__doc__)
