"""Sampling from any model, token by token over state of constant size."""
