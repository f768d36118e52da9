"""From limits to a policy: the exact solver, meta-networks and their projection onto a budget, search, sensitivities.

Knows costs (`costs/`) and additive values that come in as numbers or callables; refuses to know the supernet and how costs were measured.
"""
