"""The steps of a merge: planned, computed tensor by tensor, verified; `merging.py` puts them together."""
