"""Benchmarks: tasks as data, scoring as pure functions, generation, and the sandbox for code that a model has written."""
