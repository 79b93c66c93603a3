"""Helpers independent of memories: argument checks, precision, parameters, functional calls, shapes."""
