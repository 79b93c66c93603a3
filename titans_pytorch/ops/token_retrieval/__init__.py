"""Retrieval from a memory MLP for a single token."""
