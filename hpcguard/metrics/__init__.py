"""Figures computed from arrays: accuracy with intervals, statistics and stability of explanations."""
