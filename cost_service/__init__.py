"""Predicted cost of recomputation, swap and output length, and the actor that learns and serves it."""
