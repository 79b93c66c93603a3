"""The models of this package in the form of Hugging Face's `transformers`, and memories to add to models of its own.

    import titans_pytorch.hf

    model = AutoModelForCausalLM.from_pretrained('a folder of a Titans model')

Needs the extra `hf`: `pip install .[hf]`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from titans_pytorch.hf.adapter import add_memory, load_memory, memory_parameters, remove_memory, save_memory
from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.configuration import TitansConfig
from titans_pytorch.hf.conversion import pretrained_to_run, run_to_pretrained
from titans_pytorch.hf.modeling import TitansForCausalLM, TitansModel, TitansPreTrainedModel
from titans_pytorch.hf.tokenization import byte_tokenizer
from titans_pytorch.hf.trainer import MemoryCheckpoints

AutoConfig.register(TitansConfig.model_type, TitansConfig)
AutoModel.register(TitansConfig, TitansModel)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM)
# with label smoothing, `Trainer` shifts the labels of these classes only
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[TitansConfig.model_type] = TitansForCausalLM.__name__

__all__ = [
    'MemoryCheckpoints',
    'TitansCache',
    'TitansConfig',
    'TitansForCausalLM',
    'TitansModel',
    'TitansPreTrainedModel',
    'add_memory',
    'byte_tokenizer',
    'load_memory',
    'memory_parameters',
    'pretrained_to_run',
    'remove_memory',
    'run_to_pretrained',
    'save_memory',
]
