"""From limits to a policy: the exact solver, the meta-network and its projection onto a budget, sensitivities.

Knows costs (`costs/`) and additive values that come in as numbers or callables; refuses to know the supernet and how costs were measured.
"""
