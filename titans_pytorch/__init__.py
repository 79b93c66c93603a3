"""Neural long-term memory for sequence models: Titans (arXiv 2501.00663) and what learns at test time."""

from titans_pytorch.lmm import LongTermMemoryModel
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.mag_transformer import MemoryAsGateTransformer
from titans_pytorch.mal_transformer import MemoryAsLayerTransformer
from titans_pytorch.memory_models import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
)
from titans_pytorch.models.documents import pad_to_bucket
from titans_pytorch.models.state import ModelState
from titans_pytorch.neural_memory import NeuralMemory, NeuralMemState, mem_state_detach
from titans_pytorch.ops._dispatch import without_kernels
from titans_pytorch.utils.parameters import reference_state_dict

__version__ = '1.0.0'

__all__ = [
    'FactorizedMemoryMLP',
    'GatedResidualMemoryMLP',
    'LongTermMemoryModel',
    'MemoryAsContextTransformer',
    'MemoryAsGateTransformer',
    'MemoryAsLayerTransformer',
    'MemoryAttention',
    'MemoryMLP',
    'MemorySwiGluMLP',
    'ModelState',
    'NeuralMemState',
    'NeuralMemory',
    'mem_state_detach',
    'pad_to_bucket',
    'reference_state_dict',
    'without_kernels',
]
