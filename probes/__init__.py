"""Probes on heads: batched ridge and logistic fits, directions, selectivity.

Nothing is here yet. What will live here: probes fitted on all heads at once from streaming
sufficient statistics, nested cross-validation, control tasks, and makers of steering recipes.
"""
