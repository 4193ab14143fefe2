"""Sweeps: cells, the jobs that they share, what is done of them, running them, the table."""
