"""The commands of `abba`, one file a command or a pair; thin shells that import heavy rooms inside the function."""
