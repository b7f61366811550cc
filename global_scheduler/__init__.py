"""Fairness between users across all replicas: counters, placement, and the actor that merges them."""
