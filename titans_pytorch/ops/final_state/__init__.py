"""States of a matrix after a block of chunks."""
