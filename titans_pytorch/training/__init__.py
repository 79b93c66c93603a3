"""The parts that training scripts and commands share: vocabularies, data, checkpoints and runs."""
