"""How near products of low-rank matrices come to a given matrix, at equal numbers of parameters: the paper's Figure 2."""
