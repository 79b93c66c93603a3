"""The parts that all models share: blocks around a residual stream, decoding steps, documents, states."""
