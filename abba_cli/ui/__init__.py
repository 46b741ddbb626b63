"""The only rooms that print: a training run, the steps of other commands, a conversation."""
