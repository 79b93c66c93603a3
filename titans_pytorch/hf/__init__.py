"""Models and memories for Hugging Face transformers (`pip install titans-neural-memory[hf]`)."""

from titans_pytorch.hf.adapter import add_memory, load_memory, memory_parameters, remove_memory, save_memory

__all__ = ['add_memory', 'load_memory', 'memory_parameters', 'remove_memory', 'save_memory']
