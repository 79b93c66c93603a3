"""Sampling loops and decoding steps for any model that implements `decodable.Decodable`."""
