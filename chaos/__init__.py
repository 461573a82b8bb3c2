"""Chaos: many requests, everything killed in the midst of them, and a ledger that says what became of each."""
