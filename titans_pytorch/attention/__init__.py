"""Attention over segments and sliding windows, with persistent memory tokens and rotary positions."""
