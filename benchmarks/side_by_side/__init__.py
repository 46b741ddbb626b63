"""The side-by-side benchmark behind `python benchmarks/run.py`: grids of rows, one process a row, a table and plots."""
