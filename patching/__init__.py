"""Patching and attribution: what a head causes, one file per method.

Nothing is here yet. What will live here: the exact patching engine, ablation and pruning, direct
effects, path patching, gradient attribution verified by exact patches, and circuits.
"""
