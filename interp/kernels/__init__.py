"""Exact attention statistics without the matrix: plans, gathers and block sweeps."""
