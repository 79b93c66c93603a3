"""The parts of `NeuralMemory`: chunks, weights over time, backends, states."""
