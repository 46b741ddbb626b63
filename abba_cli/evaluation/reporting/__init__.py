"""From scores to numbers with their errors, and from results to tables and pictures."""
