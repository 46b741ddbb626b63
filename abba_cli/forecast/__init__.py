"""How much memory a run will take, found by going through one of its steps without any."""
