"""A trained adapter in the formats of other programs: one module a target, each a function of an adapter directory."""
