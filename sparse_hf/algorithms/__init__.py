"""Tensors in, tensors out: scores, budgets, schedules and the selection of the weights that stay.

Nothing here knows a module, a model, a config or a process group. A mask is a bool tensor, True = kept.
"""
