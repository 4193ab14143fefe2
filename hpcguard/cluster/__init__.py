"""Where work runs: plans, a bounded local pool, ranks. The only part that reads the process environment."""
