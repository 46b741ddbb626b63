"""The protocol `harness`: a model in memory scored by lm-evaluation-harness."""
