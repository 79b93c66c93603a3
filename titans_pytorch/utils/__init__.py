"""Argument checks, precision, parameters and calls of modules: helpers that know nothing of memories."""
