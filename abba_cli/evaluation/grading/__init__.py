"""What is found in an answer, and whether it is right: pure functions, one module for each kind of answer."""
