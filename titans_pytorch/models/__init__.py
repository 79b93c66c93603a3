"""The parts of every model: blocks around a residual stream, documents, states."""
