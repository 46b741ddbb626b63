"""`abba sweep`: many runs of one recipe, and which of its variants is best."""
