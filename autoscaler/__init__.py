"""Readings of the backlog -> policy -> targets, placed on nodes, each decision on record."""
