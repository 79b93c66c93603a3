"""`NeuralMemory`: a small network whose weights are the memory (Titans, arXiv 2501.00663, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import Linear, Module, Parameter

from titans_pytorch.memory.backends import Backend, DenseBackend, DualBackend, StoreInputs, choose_backend
from titans_pytorch.memory.chunks import Chunks, WeightResidual
from titans_pytorch.memory.fast_weights import FastWeights, MemoryWeights, Weights
from titans_pytorch.memory.initial_weights import InitialWeights
from titans_pytorch.memory.modules import (
    AttentionPool,
    AveragePool,
    Gate,
    L2Norm,
    MultiheadRMSNorm,
    PerHead,
    SplitHeads,
    gate,
    join_heads,
    linear_from,
    pointwise,
    projection,
    rows_of_heads,
)
from titans_pytorch.memory.packing import PackedDocuments, check_documents
from titans_pytorch.memory.reference import LossFn, Transition, default_loss_fn
from titans_pytorch.memory.schedule import QueryGroups, Schedule
from titans_pytorch.memory.settings import check_memory_loss, check_memory_model, checked_settings
from titans_pytorch.memory.soft_clamp import softclamp_grad_norm, softclamp_max
from titans_pytorch.memory.state import (
    BufferSizes,
    MemoryBuffers,
    NeuralMemState,
    OpenState,
    PendingSegment,
    Surprises,
    mem_state_detach,
)
from titans_pytorch.memory.token_retrieval import PlainRetrieval
from titans_pytorch.memory.validation import Call, MemoryLayout
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.ops._streams import side_by_side
from titans_pytorch.ops.associative_scan import AssocScan
from titans_pytorch.ops.newton_schulz import newtonschulz5
from titans_pytorch.ops.token_linear import linear_of_token
from titans_pytorch.utils.checks import check_bound, check_flags, check_not_traced, described
from titans_pytorch.utils.functional import (
    can_checkpoint,
    checkpointed,
    compile_each_length,
    frozen_as_buffers,
    replaced,
)
from titans_pytorch.utils.parameters import InReferenceFormat, Resettable, depending_on
from titans_pytorch.utils.precision import (
    at_least_float32,
    for_products,
    in_module_precision,
    network_autocast,
    network_rows,
    operand_dtype,
)
from titans_pytorch.utils.shapes import Bool, Float, Int, concatenated, is_empty

__all__ = [
    'AssocScan',
    'AttentionPool',
    'AveragePool',
    'MultiheadRMSNorm',
    'NeuralMemState',
    'NeuralMemory',
    'Surprises',
    'default_adaptive_step_transform',
    'default_loss_fn',
    'mem_state_detach',
    'newtonschulz5',
    'softclamp_grad_norm',
    'softclamp_max',
]

EMPTY = NeuralMemState(0, None, None, None, None)


def default_adaptive_step_transform(adaptive_step: Tensor, max_lr: float = 1e-2) -> Tensor:
    """Map logits to step sizes in (0, `max_lr`) by a sigmoid."""
    return adaptive_step.sigmoid() * max_lr


class NeuralMemory(Resettable, InReferenceFormat):
    """Neural long-term memory that learns at test time.

    Each token t yields a key, a value and a query. Storing is gradient descent of the memory network M on the loss
    ℓ_t, the mean over features of (M(k_t) − v_t)², chunk by chunk, with momentum (the surprise S carries over) and
    forgetting. For chunk c:

        S_c = η_c S_{c−1} − Σ_t θ_t ∇ℓ_t          (over its tokens t; Titans eq. 10)
        M_c = (1 − α_c) M_{c−1} + S_c             (eq. 13)

    The step size θ is learned per token, momentum η and forgetting α per chunk. Retrieving is M(q). Token t, counted
    from 0 over all calls, reads the weights after ⌊(t + 1) / chunk⌋ complete chunks, so the result does not depend on
    how a sequence is split into calls.

    Two lengths govern when weights change. A **chunk** is stored in one step: the gradients of its tokens are summed,
    and it has one η and one α. A **memory batch** is a number of consecutive chunks whose gradients are all taken at
    the same base weights, those at its start, so that they can be computed in parallel. Positions are counted over all
    calls.

    Args:
        dim: width of the input and of the output.
        chunk_size: tokens per chunk. Of a pair (retrieve, store), the store size is the chunk; the retrieve size is
            accepted for compatibility and changes no number.
        batch_size: tokens per memory batch, a multiple of the chunk size. `None`: the base weights never change, and
            all gradients are taken at the initial weights.
        dim_head: width of a head. Default: `dim`, which one head requires.
        heads: independent memories, whose outputs a learned projection and gate combine.
        model: the memory network, any module that maps (tokens, dim_head) to the same shape, has no buffers and, if it
            mixes tokens, is causal. Default: `MemoryMLP(dim_head, **default_model_kwargs)`. Weights with
            `requires_grad=False` are constants, which neither the memory nor an optimizer changes.
        store_memory_loss_fn: maps (prediction, target) to a loss per token. Default: mean squared error.
        adaptive_step_transform: maps step-size logits (batch · heads, rows to store) to step sizes, each by itself, as
            a sequence may be split anywhere. Default: sigmoid times `default_step_transform_max_lr`.
        default_step_transform_max_lr: the largest step size. A chunk is one step on the sum of its tokens' gradients,
            and all steps of a memory batch are taken at the same weights: the longer either is, the smaller this must
            be. `train_mac.py` uses 0.1 with chunks of 4 and memory batches of 128. With 0 nothing is stored.
        per_parameter_lr_modulation: learn a factor in (0, `max_mem_layer_modulation`) for the step of each parameter.
        max_mem_layer_modulation: the largest such factor.
        per_head_learned_parameters: learn initial weights for each head; otherwise heads share them.
        attn_pool_chunks: pool each chunk for its gates by learned attention instead of the mean.
        momentum: carry surprise over from chunk to chunk.
        momentum_order: number of times momentum is applied to itself.
        learned_momentum_combine: combine the orders with learned weights instead of using the last one.
        learned_combine_include_zeroth: include the surprise without momentum in that combination.
        num_kv_per_token: keys and values that each token stores.
        qkv_receives_diff_views: the input is (3, batch, length, dim), one view each for queries, keys and values.
        pre_rmsnorm: RMS norm of the input.
        post_rmsnorm: RMS norm of the retrieved values, per head.
        qk_rmsnorm: RMS norm of queries and keys, per head; advised for stability.
        max_grad_norm: move the norm x of each parameter's gradient in each chunk to (tanh(2x / max) + 1) · max / 2,
            between half of this bound and the bound; small gradients grow. A gradient below 64 machine epsilons of
            `max_grad_norm` is left unchanged, because it consists of rounding errors.
        use_accelerated_scan: run the recurrences of the dense engine in a Triton kernel on a GPU. The dual engine has
            no such recurrences.
        activation: activation of queries, keys and values, which it takes token by token. They share its parameters,
            if it has any.
        init_adaptive_step_bias: initial logit of the step sizes, the same for every token.
        init_momentum_bias: initial logit of momentum.
        init_decay_bias: initial logit of forgetting, which also wears away the initial weights. The default starts near
            a half per chunk, which a deep memory may not survive; about −3 keeps memory long at first, −inf for good.
        accept_weight_residual: take gradients at the base weights plus a learned share of another memory's weights
            (`prev_weights`).
        spectral_norm_surprises: orthogonalise the momentum of each chunk by Newton–Schulz (Muon) before it is applied.
            The size of momentum and steps then no longer matters, except for parameters that are not matrices.
        gated_transition: let the weights move only part of the way, from those at the start of a memory batch to those
            at its end, by a learned share that starts at sigmoid(−5). Queries and gradients of the next one read these.
        mem_model_norm_add_residual: wrap the network as LN(f(x)) + x (TTT).
        store_with_lookahead_value: pair each key with the value of the next row in its chunk, which is the next
            token's if each token has one key (arXiv 2601.00671). The last row of a chunk stores nothing; chunks of a
            single row never store anything.
        default_model_kwargs: arguments of the default network.
        engine: backend of the memory. 'dual' forms no weight matrix per chunk and serves networks that send their
            products through `linear`; 'dense' forms all of them and serves any network; 'auto' is 'dual' for every
            network that it can serve. All give the same numbers.
        qk_l2norm: scale queries and keys to length 1, per head, in place of `qk_rmsnorm` (Titans, section 4.4).
        conv_kernel: width of a depthwise causal convolution after each projection to queries, keys and values, before
            the activation. The paper's architectures have one; 4, as in Mamba, is usual. A state then also holds the
            tokens that the convolutions still see.
        channel_gate: gate the retrieved values per channel instead of per head; also with one head.
        proximal_steps: take the gradient of a chunk at the weights that its step leads to, instead of those before it
            (see `titans_pytorch.ops.proximal_steps`), so that steps do not overshoot, however large
            `default_step_transform_max_lr` is. A linear memory moves half of the way to the value of a key k by a step
            size of dim_head / (2 ‖k‖²), and four fifths by four times as much. Requires `batch_size`, the default loss
            and a network that treats rows separately and that the dual engine can serve; excludes what changes a step
            afterwards: `max_grad_norm`, `spectral_norm_surprises` and a `max_mem_layer_modulation` above 1.
        normalized_momentum: momentum that spreads the step u of a chunk over later chunks without making it larger, for
            each order: S_t = (1 − η_t) (P_{t−1} + u_t), where P_t = η_t (P_{t−1} + u_t) is carried over. With momentum,
            proximal steps need it to be safe from overshooting. Excludes `spectral_norm_surprises`.
        lookahead_gradients: take gradients at M + Σ P, summed over orders, the weights that the memory will have, but
            for decay, once momentum has handed on all that it holds, as Nesterov's momentum does. Gradients at M ask in
            every chunk for what momentum holds already, and when η falls all of it arrives at once. Queries still read
            M, and `recall` reads the base weights, M + Σ P. Requires `batch_size` and `normalized_momentum`; excludes
            `learned_momentum_combine` and `gated_transition`, with which momentum leads elsewhere.
        checkpoint_every: tokens per checkpoint segment (activation checkpointing). The backward pass recomputes
            everything within a segment, so that a training step holds one segment and a state for each of the others,
            for a third more work; with gradients `state.updates` is `None`. Requires the dual engine; excludes
            `accept_weight_residual`. Default: keep everything.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument, the expected value and
            the given one.
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int | Sequence[int] = 1,
        batch_size: int | None = None,
        dim_head: int | None = None,
        heads: int = 1,
        model: Module | None = None,
        store_memory_loss_fn: LossFn = default_loss_fn,
        adaptive_step_transform: Callable[[Tensor], Tensor] | None = None,
        default_step_transform_max_lr: float = 1.0,
        per_parameter_lr_modulation: bool = False,
        max_mem_layer_modulation: float = 1.0,
        per_head_learned_parameters: bool = True,
        attn_pool_chunks: bool = False,
        momentum: bool = True,
        momentum_order: int = 1,
        learned_momentum_combine: bool = False,
        learned_combine_include_zeroth: bool = False,
        num_kv_per_token: int = 1,
        qkv_receives_diff_views: bool = False,
        pre_rmsnorm: bool = True,
        post_rmsnorm: bool = False,
        qk_rmsnorm: bool = False,
        max_grad_norm: float | None = None,
        use_accelerated_scan: bool = False,
        activation: Module | None = None,
        init_adaptive_step_bias: float | None = None,
        init_momentum_bias: float | None = None,
        init_decay_bias: float | None = None,
        accept_weight_residual: bool = False,
        spectral_norm_surprises: bool = False,
        gated_transition: bool = False,
        mem_model_norm_add_residual: bool = True,
        store_with_lookahead_value: bool = False,
        default_model_kwargs: Mapping[str, Any] = {'depth': 2, 'expansion_factor': 4.0},
        *,
        engine: str = 'auto',
        checkpoint_every: int | None = None,
        qk_l2norm: bool = False,
        conv_kernel: int | None = None,
        channel_gate: bool = False,
        proximal_steps: bool = False,
        normalized_momentum: bool = False,
        lookahead_gradients: bool = False,
    ):
        super().__init__()
        settings = checked_settings(locals(), NeuralMemory)
        dim, dim_head, heads = settings.dim, settings.dim_head, settings.heads
        num_kv_per_token, momentum_order = settings.num_kv_per_token, settings.momentum_order
        retrieve_chunk_size, store_chunk_size = settings.retrieve_chunk_size, settings.store_chunk_size
        conv_kernel = settings.conv_kernel

        self.dim = dim
        self.heads = heads
        is_pair = isinstance(chunk_size, (tuple, list))
        self.chunk_size = (retrieve_chunk_size, store_chunk_size) if is_pair else store_chunk_size
        self.retrieve_chunk_size, self.store_chunk_size = retrieve_chunk_size, store_chunk_size
        self.batch_size = settings.batch_size
        self.checkpoint_every = settings.checkpoint_every
        self.num_kv_per_token = num_kv_per_token
        self.qkv_receives_diff_views = qkv_receives_diff_views
        self.store_with_lookahead_value = store_with_lookahead_value
        self.momentum_order = momentum_order
        self.max_mem_layer_modulation = settings.max_modulation
        self.max_grad_norm = settings.max_grad_norm
        self._orthogonalises = spectral_norm_surprises
        self.proximal_steps = proximal_steps
        self.normalized_momentum = normalized_momentum
        self.lookahead_gradients = lookahead_gradients
        self.per_head_learned_parameters = per_head_learned_parameters
        self.store_memory_loss_fn = store_memory_loss_fn
        self.adaptive_step_transform = adaptive_step_transform or partial(
            default_adaptive_step_transform, max_lr=settings.max_step_size
        )

        # the memory

        check_memory_loss(store_memory_loss_fn, (max(1, self._rows_per_chunk), dim_head))
        model = _memory_network(model, dim_head, default_model_kwargs)
        model = ResidualNorm(dim_head, model) if mem_model_norm_add_residual else model
        self._backend_class = choose_backend(
            engine, model, dim_head, store_chunk_size * num_kv_per_token, spectral_norm_surprises, proximal_steps
        )
        if checkpoint_every is not None and self._backend_class is DenseBackend:
            # the dense backend uses torch.func, which keeps saved tensors: checkpoints would save no memory
            raise ValueError("checkpoint_every needs engine='dual', and this memory is dense")
        self._hold(model)
        self.transition_gate = Parameter(torch.empty(1)) if gated_transition else None
        self.assoc_scan = AssocScan(use_accelerated=use_accelerated_scan)

        # queries, keys and values

        dim_inner = dim_head * heads
        self.retrieve_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.to_queries = projection(dim, dim_inner, activation, conv_kernel)
        self.to_keys = projection(dim, dim_inner * num_kv_per_token, activation, conv_kernel)
        self.to_values = projection(dim, dim_inner * num_kv_per_token, activation, conv_kernel)
        self.conv_context = 0 if conv_kernel is None else conv_kernel - 1
        norm = partial(MultiheadRMSNorm, dim_head, heads) if qk_rmsnorm else L2Norm if qk_l2norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.split_heads, self.split_kv_heads = SplitHeads(heads), SplitHeads(heads, num_kv_per_token)

        # retrieved values

        self.multihead_rmsnorm = MultiheadRMSNorm(dim_head, heads) if post_rmsnorm else nn.Identity()
        self.combine_heads = Linear(dim_inner, dim, bias=False) if heads > 1 else nn.Identity()
        num_gates = dim_inner if channel_gate else heads if heads > 1 else 0
        self.retrieve_gate = (
            nn.Sequential(Linear(dim, num_gates, bias=False), SplitHeads(heads), nn.Sigmoid()) if num_gates else None
        )

        # gates: step sizes per key, the rest per chunk

        gates = partial(gate, dim, heads)
        mixed_orders = momentum_order + learned_combine_include_zeroth
        self.reduce_to_chunk_rep = (
            AttentionPool(dim, store_chunk_size) if attn_pool_chunks else AveragePool(store_chunk_size)
        )
        self.to_adaptive_step = Gate(
            linear_from(dim, heads * num_kv_per_token, init_adaptive_step_bias),
            PerHead(heads, num_kv_per_token),
            nn.Flatten(1),
        )
        self.to_decay_factor = gates(1, start=init_decay_bias)
        self.to_momentum = gates(momentum_order, start=init_momentum_bias) if momentum else None
        self.to_learned_momentum_combine = gates(mixed_orders, nn.Softmax(dim=-1)) if learned_momentum_combine else None
        self.to_layer_modulation = (
            gates(self.num_memory_parameter_tensors, nn.Sigmoid()) if per_parameter_lr_modulation else None
        )
        self.to_learned_weight_residual_mix = gates(1, nn.Sigmoid()) if accept_weight_residual else None

        self._reset_own()

    def _reset_own(self) -> None:
        if self.transition_gate is not None:
            nn.init.constant_(self.transition_gate, -5.0)

    # checkpoints of the reference, which hold the memory network twice

    scalars = ('transition_gate',)

    def write_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        if next(self.memory_model_parameters.buffers(), None) is not None:
            raise ValueError('module must have no memory network with frozen parts, which the reference trains')
        super().write_reference(state_dict, prefix)
        for name, index in self.memory_model_parameters.all_names.items():
            weight = state_dict[f'{prefix}memory_model_parameters.{index}']
            # the reference never trains this second copy; where each head has its own weights, head 0 stands for it
            first = weight[0] if self.per_head_learned_parameters else weight
            state_dict[f'{prefix}memory_model.{name}'] = first.clone()

    def read_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        super().read_reference(state_dict, prefix)
        one_tensor = not self.per_head_learned_parameters or self.heads == 1
        shapes = [*self._parameter_shapes.values()]
        for name, index in self.memory_model_parameters.all_names.items():
            copy = state_dict.pop(f'{prefix}memory_model.{name}', None)
            key = f'{prefix}memory_model_parameters.{index}'
            # there, both names denote one tensor, and a file that stores it once may use either
            if copy is not None and one_tensor and key not in state_dict and copy.shape == shapes[index]:
                state_dict[key] = copy.reshape(self.init_weight_shape[index])

    # the memory network and its weights

    def _hold(self, model: Module) -> None:
        """Register the weights of a memory network as learned initial weights, and keep the rest as a template."""
        self._parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.memory_model_parameters = InitialWeights(model, self.heads if self.per_head_learned_parameters else None)
        self.memory_model_parameter_names = self.memory_model_parameters.names
        self.num_memory_parameter_tensors = len(self.memory_model_parameters)
        self.init_weight_shape = [tuple(p.shape) for p in self.memory_model_parameters]

    @property
    def memory_model(self) -> Module:
        """The memory network with the first head's learned initial weights: an empty memory, to call or inspect.

        Each access creates a new module, whose weights are views of the trained `memory_model_parameters`.
        """
        initial = zip(self.memory_model_parameter_names, self.memory_model_parameters)
        first = {name: w[0] if self.per_head_learned_parameters else w.view_as(w) for name, w in initial}
        return self.memory_model_parameters.with_weights(first)

    @property
    def _network(self) -> Module:
        """The memory network as a template, without weights."""
        return self.memory_model_parameters.network

    @property
    def memory_model_parameter_dict(self) -> TensorDict:
        """The learned initial weights by name, (h, …), or (…) if heads share them."""
        return TensorDict(self.memory_model_parameters())

    def train(self, mode: bool = True) -> NeuralMemory:
        self.memory_model_parameters.template[0].train(mode)
        return super().train(mode)

    @property
    def _dtype(self) -> torch.dtype:
        """Precision of the parameters. (Offloaded parameters may be on another device than the tensors of a call.)"""
        return self.memory_model_parameters[0].dtype

    def init_weights(self, batch: int) -> TensorDict:
        """Weights of an empty memory, per parameter (batch · heads, …), in float32 or float64."""
        count = batch if self.per_head_learned_parameters else batch * self.heads
        named = self.memory_model_parameters()
        # copies, because a state keeps them while an optimizer changes the parameters in place
        copies = {name: p.repeat(count, *(1,) * len(self._parameter_shapes[name])) for name, p in named.items()}
        return TensorDict({name: at_least_float32(p) for name, p in copies.items()})

    def init_momentum(self, batch: int) -> TensorDict:
        """Momentum of an empty memory: zeros, per parameter (orders, batch · heads, …)."""
        leading = (self.momentum_order, batch * self.heads)
        named = self.memory_model_parameters()
        shapes = self._parameter_shapes
        return TensorDict({name: at_least_float32(p.new_zeros(*leading, *shapes[name])) for name, p in named.items()})

    @property
    def _layout(self) -> MemoryLayout:
        return MemoryLayout(
            dim=self.dim,
            heads=self.heads,
            chunk_size=self.store_chunk_size,
            momentum_orders=0 if self.to_momentum is None else self.momentum_order,
            different_views=self.qkv_receives_diff_views,
            conv_context=self.conv_context,
            dtype=self._dtype,
            parameters=self._parameter_shapes,
        )

    @property
    def _backend(self) -> Backend:
        return self._backend_for(self.batch_size, 1)

    def _backend_for(self, batch_size: int | None, num_chunks: int) -> Backend:
        """The backend for a call that completes `num_chunks` chunks, in memory batches of `batch_size` tokens."""
        return self._backend_class(
            self._network,
            self.memory_model_parameters.mlp,
            self.store_memory_loss_fn,
            self.assoc_scan,
            self.max_grad_norm,
            self._orthogonalises,
            self._num_proximal_steps(batch_size, num_chunks) if self.proximal_steps else None,
        )

    def _num_proximal_steps(self, batch_size: int | None, num_chunks: int) -> int:
        """Number of proximal steps that add up at the same weights: one per parameter and chunk of a memory batch.

        Without memory batches, all chunks of the call are stored at the same weights. They may be only part of what is
        stored there, so the count is at least that of the layer's own memory batch.
        """
        if batch_size is None:
            chunks = max(num_chunks, (self.batch_size or 0) // self.store_chunk_size)
        else:
            chunks = batch_size // self.store_chunk_size
        return len(self.memory_model_parameter_names) * chunks

    @property
    def spectral_norm_surprises(self) -> bool:
        """The constructor's argument. It is read-only, because the choice of the backend depends on it."""
        return self._orthogonalises

    @property
    def mixes_tokens(self) -> bool:
        """True if the memory network's output for a row depends on other rows."""
        return not getattr(self._network, 'rowwise', False)

    @property
    def uses_func_transforms(self) -> bool:
        """True if `torch.func` takes the gradients, False if they are written out (a plain MLP, the default loss)."""
        written_out = self.memory_model_parameters.mlp is not None and self.store_memory_loss_fn is default_loss_fn
        return self._backend_class is DenseBackend or not written_out

    @property
    def is_linear(self) -> bool:
        """True if the memory network is a single matrix, with or without a norm."""
        mlp = self.memory_model_parameters.mlp
        return mlp is not None and len(mlp.matrices) == 1

    @property
    def reads_documents(self) -> bool:
        """True if several documents in a row can be read in one call, each starting from an empty memory.

        The recurrences of the dual engine allow this, with the initial weights as one more state. Steps that are not
        linear in the states rule it out, and so does anything that depends on other rows or on the length of a call.
        """
        recurrent = self._backend_class is DualBackend and self.transition_gate is None and not self.lookahead_gradients
        by_itself = not self.mixes_tokens and self.to_learned_weight_residual_mix is None
        return recurrent and by_itself and self.checkpoint_every is None

    @property
    def _carries_queries(self) -> bool:
        """True if the value retrieved for a query depends on earlier queries that read the same weights."""
        return self.store_chunk_size > 1 and self.mixes_tokens

    # calls

    def forward(
        self,
        seq: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d'] | Float[Tensor, 'b d'],
        store_seq: Tensor | None = None,
        state: NeuralMemState | None = None,
        detach_mem_state: bool = False,
        prev_weights: Mapping[str, Tensor] | None = None,
        store_mask: Bool[Tensor, 'b _n'] | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
        *,
        cache: NeuralMemState | None = None,
        store: bool = True,
        documents: PackedDocuments | None = None,
    ) -> Any:
        """Store a sequence, or a piece of one, and retrieve a value for each of its tokens.

        Args:
            seq: (batch, length, dim). With `qkv_receives_diff_views`, (3, batch, length, dim): the views for queries,
                keys and values; or (1, batch, length, dim) if `store_seq` is given. Without the length axis it is a
                single token.
            store_seq: the sequence to store, if it is not `seq`. Both must have the same length, because token t of
                `seq` reads the chunks that are complete at token t of `store_seq`. With different views, (2, batch,
                length, dim).
            state: the state returned by the previous call. The pieces of a sequence may have any length.
            detach_mem_state: detach the returned state from the graph.
            prev_weights: another memory's `state.updates`, required with `accept_weight_residual`. It covers either the
                tokens of this call or the whole sequence up to and including this call.
            store_mask: true for tokens to store: booleans, or the integers 0 and 1, (batch, length). A masked token has
                step size 0 but still belongs to its chunk: it takes part in the pooled gates, and the chunk still
                decays the weights when it is complete. To leave the memory unchanged, use `store=False`.
            return_surprises: also return the `Surprises` of the completed chunks: losses and step sizes, (batch, heads,
                rows) each.
            ttt_batch_size: memory-batch length for this call, in place of `batch_size`.
            cache: alias of `state`.
            store: false to read without writing. All tokens then read the weights after the last complete chunk, and
                the state keeps its weights, momentum, position and open chunk. Only queries are still recorded: for
                convolutions, and for a memory network that mixes tokens, which sees them in groups of one chunk length.
            documents: several documents packed into each row, each read as if it were alone; see `reads_documents`. The
                models prepare this argument.
        Returns:
            the retrieved values (batch, length, dim), with a length of 1 for a single token; the state; and, with
            `return_surprises`, the surprises.

        Raises:
            ValueError, TypeError: for inputs and states that do not fit; the message names the argument.
        """
        check_not_traced(type(self).__name__)
        if cache is not None:
            if state is not None:
                raise ValueError('state and cache are aliases: pass one of them')
            state = cache

        check_flags(detach_mem_state=detach_mem_state, return_surprises=return_surprises, store=store)
        if not store and (store_seq is not None or store_mask is not None):
            raise ValueError('store=False stores nothing: leave out store_seq and store_mask')
        call = self._layout.call(seq, store_seq, store_mask, ttt_batch_size, self.batch_size)
        compile_each_length(call.queries.shape[1], call.to_store.shape[-2])
        call = call if store else call.read_only()
        if documents is not None:
            check_documents(documents, len(call.queries), call.queries.shape[1], self.store_chunk_size)
            if state is not None or not store or not self.reads_documents:
                raise ValueError('documents need a call without state that stores, and a memory that reads_documents')
            call = call.of_documents(documents)
        state = EMPTY if state is None else state
        if self.checkpoint_every is not None and can_checkpoint():
            pieces = call.pieces(self.checkpoint_every)
            retrieved, next_state, surprises = self._checkpointed(pieces, state, prev_weights, return_surprises)
        else:
            retrieved, next_state, surprises = self._forward(call, state, prev_weights, return_surprises)
        # with several processes, parameters that this call does not use must be in the graph too: a later call does not
        # use the initial weights, and a short one completes no chunk
        retrieved = depending_on(self.parameters(), retrieved)
        next_state = next_state.detach() if detach_mem_state else next_state
        return (retrieved, next_state, surprises) if return_surprises else (retrieved, next_state)

    def _forward(
        self, call: Call, state: NeuralMemState, prev_weights: Mapping[str, Tensor] | None, with_surprises: bool
    ) -> tuple[Float[Tensor, 'b n d'], NeuralMemState, Surprises | None]:
        before = self._opened(state, call.queries)
        weights, after, surprises = self._store(call, before, prev_weights, with_surprises)
        position = self._position_in_chunk(before.pending, call.stores)
        rows, carried = self._query_rows(call.queries, before.pending, position)
        retrieved = self._retrieve(call.queries.shape[1], rows, weights, position)

        after = replaced(after, pending=replaced(after.pending, queries=carried))
        return retrieved, after.to_state(weights), surprises

    def _checkpointed(
        self,
        pieces: Iterable[Call],
        state: NeuralMemState,
        prev_weights: Mapping[str, Tensor] | None,
        with_surprises: bool,
    ) -> tuple[Float[Tensor, 'b n d'], NeuralMemState, Surprises | None]:
        """`_forward` piece by piece; the backward pass recomputes each piece."""

        def forward(piece: Call, state: NeuralMemState) -> Any:
            retrieved, after, surprises = self._forward(piece, state, prev_weights, with_surprises)
            return retrieved, replaced(after, updates=None), surprises

        retrieved, surprises = [], []
        forward_again = checkpointed(forward, not self.uses_func_transforms)
        for piece in pieces:
            out, state, surprise = forward_again(piece, state)
            retrieved.append(out)
            surprises.append(surprise)
        return torch.cat(retrieved, dim=1), state, Surprises.joined(surprises) if with_surprises else None

    def store_memories(
        self,
        seq: Float[Tensor, 'b n d'] | Float[Tensor, 'v b n d'],
        weights: Mapping[str, Tensor] | None = None,
        past_state: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
        seq_index: int = 0,
        prev_weights: Mapping[str, Tensor] | None = None,
        mask: Bool[Tensor, 'b n'] | None = None,
        return_surprises: bool = True,
    ) -> Any:
        """Store the complete chunks of `seq`, with all gradients taken at `weights`, and retrieve nothing.

        Convolutions see zeros before `seq`. With different views, the returned state holds no queries. A call that
        continues from it then sees zeros in their place, if it depends on them: in convolutions, or in a memory network
        that mixes tokens. Proximal steps are sized for the chunks of `seq`, or of a memory batch if that has more, as
        the number that adds up at the same `weights`. Storing further sequences there may overshoot.

        Args:
            seq: (batch, length, dim); (2, batch, length, dim) with different views.
            weights: base weights, (bh, …) by parameter. Default: the initial weights.
            past_state: weights and momentum to continue from. Default: `weights`, and no momentum.
            seq_index: position of the first token, by which a `prev_weights` over the whole sequence is aligned.
            prev_weights, mask, return_surprises: as in `forward`, where `mask` is called `store_mask`.

        Returns:
            the weights over time, (bh, chunks + 1, …) by parameter; the state, which holds the tokens of the
            incomplete chunk in `cache_store_segment`; and, with `return_surprises`, the surprises.

        Raises:
            ValueError, TypeError: for arguments that do not fit the memory or each other; the message names the
                argument.
        """
        check_flags(return_surprises=return_surprises)
        self._layout.check_store('seq', seq)
        compile_each_length(seq.shape[-2])
        mask = self._layout.checked_mask('mask', mask, seq)
        queries = seq[0] if self.qkv_receives_diff_views else seq

        given = replaced(EMPTY, seq_index=seq_index, weights=weights, states=past_state)
        before = self._opened(given, queries, names=('seq_index', 'weights', 'past_state'))
        over_time, after, surprises = self._store(
            Call(queries, seq, mask, None), before, prev_weights, return_surprises
        )
        if not self.qkv_receives_diff_views:
            _, carried = self._query_rows(queries, before.pending, self._position_in_chunk(before.pending, True))
            after = replaced(after, pending=replaced(after.pending, queries=carried))
        next_state = after.to_state(over_time)
        return (next_state.updates, next_state, *((surprises,) if return_surprises else ()))

    def retrieve_memories(self, seq: Float[Tensor, 'b n d'], weights: Mapping[str, Tensor]) -> Float[Tensor, 'b n d']:
        """Retrieve values for `seq`, which starts where a chunk starts, from given weights.

        `weights` are tensors by parameter name: weights over time, (bh, chunks + 1, …), like `state.updates`, where
        token t reads entry ⌊(t + 1) / chunk⌋; constant weights, (bh, …), like `state.weights`; or the initial weights.

        Raises:
            ValueError, TypeError: for weights of another memory, and for weights over time that cover too few chunks.
        """
        self._layout.check_rows('seq', seq)
        over_time = self._layout.over_time('weights', weights, seq.shape[0], seq.device)
        length, steps = seq.shape[1], seq.shape[1] // self.store_chunk_size + 1
        if 1 < over_time.num_steps < steps:
            raise ValueError(
                f'weights must be constant or hold {steps} steps for {length} tokens in chunks of '
                f'{self.store_chunk_size}, got {over_time.num_steps}'
            )
        rows, _ = self._query_rows(seq, self._layout.no_pending(seq), 0)
        return self._retrieve(length, rows, over_time, 0)

    def recall(
        self, seq: Float[Tensor, 'b n d'], state: NeuralMemState | MemoryBuffers | None = None
    ) -> Float[Tensor, 'b n d']:
        """Retrieve values from the base weights, where the open memory batch takes its gradients, without storing.

        Each row is retrieved independently, so convolutions are left out.

        Args:
            seq: (batch, length, dim).
            state: the state of an earlier call. Default: the initial weights.

        Raises:
            ValueError: if the memory network mixes tokens.
        """
        if self.mixes_tokens:
            raise ValueError('recall retrieves every row by itself, and this memory network mixes rows')
        self._layout.check_rows('seq', seq)
        if isinstance(state, MemoryBuffers):
            base = state.weights.base
        else:
            base = self._opened(EMPTY if state is None else state, seq).weights.base
        normed = self.retrieve_norm(seq)
        queries = self._queries_of(normed, pointwise(self.to_queries))
        return self._combine(self._apply_network(base, queries), normed)

    def _opened(self, state: Any, seq: Float[Tensor, 'b n d'], **names: Any) -> OpenState:
        init_momentum = self.init_momentum if self.to_momentum is not None else lambda batch: TensorDict({})
        opened = self._layout.opened(state, seq, self.init_weights, init_momentum, **names)
        tokens, _, *rest = opened.pending
        compile_each_length(*(t.shape[-2] for t in (tokens, *rest) if t is not None))
        return opened

    # decoding: one token at a time, without gradients, in buffers of constant size

    @property
    def buffer_sizes(self) -> BufferSizes:
        """Lengths of the buffers of `MemoryBuffers`."""
        group = self.store_chunk_size if self._carries_queries else 0
        return BufferSizes(self.store_chunk_size, self.conv_context, group)

    def to_buffers(self, state: NeuralMemState, with_surprises: bool = False) -> MemoryBuffers:
        """`state` as buffers for `step`; `MemoryBuffers.to_state` is the inverse."""
        pending = state.open_chunk
        if pending is None:
            raise ValueError('state.cache_store_segment must hold the tokens of the open chunk, got None')
        tokens = pending.tokens
        opened = self._opened(state, tokens[0] if self.qkv_receives_diff_views else tokens)
        # tokens yet to come are in the memory's precision, whatever that of the state
        kept: Any = (None if t is None else t.to(torch.promote_types(t.dtype, self._dtype)) for t in opened.pending)
        buffers = MemoryBuffers.of(replaced(opened, pending=PendingSegment(*kept)), self.buffer_sizes)
        if not with_surprises:
            return buffers
        rows = next(iter(opened.weights.newest.values())).new_zeros(tokens.shape[-3], self.heads, self._rows_per_chunk)
        return replaced(buffers, surprises=Surprises(rows, rows.clone()))

    def step(
        self,
        seq: Float[Tensor, 'b 1 d'] | Float[Tensor, 'v b 1 d'],
        buffers: MemoryBuffers,
        in_chunk: Int[Tensor, ' 1'],
        ends_chunk: bool,
        ends_batch: bool,
        prev_weights: Weights | None = None,
    ) -> tuple[Float[Tensor, 'b 1 d'], MemoryBuffers]:
        """`forward` for a single token.

        Args:
            seq: the token.
            buffers: the state; the token is written into it.
            in_chunk: index of the token in its chunk.
            ends_chunk: whether the token completes the chunk, so that the weights change.
            ends_batch: whether it completes a memory batch.
            prev_weights: weights of another memory, (bh, …) by parameter, if `accept_weight_residual`.

        Returns:
            the retrieved value, and the buffers. If the chunk is complete, their weights are new tensors, because
            another memory may still have to read the old ones.
        """
        query, to_store = (seq[0], seq[1:]) if self.qkv_receives_diff_views else (seq, seq)
        context = self.conv_context
        if ends_chunk:
            tokens = torch.cat((buffers.pending, to_store), dim=-2)
            buffers = replaced(buffers, weights=self._store_one(tokens, buffers, ends_batch, prev_weights))
            buffers.pending[..., :context, :] = tokens[..., self.store_chunk_size :, :]
            return self._retrieve_one(query, buffers, in_chunk, ends_chunk), buffers
        index = in_chunk + context if context else in_chunk
        _, retrieved = side_by_side(
            partial(buffers.pending.index_copy_, -2, index, to_store.to(buffers.pending.dtype)),
            partial(self._retrieve_one, query, buffers, in_chunk, ends_chunk),
        )
        return retrieved, buffers

    def _store_one(
        self, tokens: Tensor, buffers: MemoryBuffers, ends_batch: bool, prev_weights: Weights | None
    ) -> MemoryWeights:
        chunk, pooled = self._project_chunks(tokens, None)
        residual = None
        if self.to_learned_weight_residual_mix is not None:
            assert prev_weights is not None
            previous = FastWeights({name: w.unsqueeze(1) for name, w in prev_weights.items()}, [], prev_weights)
            shares = self.to_learned_weight_residual_mix(pooled).squeeze(-1)
            residual = WeightResidual.of(previous, shares, 0)
        with network_autocast(self._dtype, tokens.device):
            after, losses = self._backend.store_chunk(chunk, buffers.weights, residual)
        if buffers.surprises is not None:
            for buffer, own in zip(buffers.surprises, self._surprises(losses.unsqueeze(1), chunk.step_sizes)):
                buffer.copy_(own)
        return self._transition(after) if ends_batch else after

    def _retrieve_one(
        self, query: Float[Tensor, 'b 1 d'], buffers: MemoryBuffers, in_chunk: Int[Tensor, ' 1'], begins_group: bool
    ) -> Float[Tensor, 'b 1 d']:
        if self._carries_queries:
            return self._retrieve_one_of_group(query, buffers, in_chunk, begins_group)
        context, newest = self.conv_context, buffers.weights.newest
        rows = query if buffers.queries is None else torch.cat((buffers.queries, query), dim=1)
        if buffers.queries is not None:
            buffers.queries.copy_(rows[:, 1:])
        plain = PlainRetrieval.of(
            self.heads,
            self.memory_model_parameters.mlp,
            self.split_heads,
            self.q_norm,
            self.multihead_rmsnorm,
            self.retrieve_gate,
            self._dtype,
        )
        if plain is None:
            normed = self.retrieve_norm(rows)
            values = self._apply_network(newest, self._queries_of(normed, self.to_queries))
            return self._combine(values, normed[:, context:])
        projected, normed = linear_of_token(self.to_queries, rows, self.retrieve_norm)
        return linear_of_token(self.combine_heads, plain(newest, projected, normed[:, context:]))[0]

    def _retrieve_one_of_group(
        self, query: Float[Tensor, 'b 1 d'], buffers: MemoryBuffers, in_chunk: Int[Tensor, ' 1'], begins_group: bool
    ) -> Float[Tensor, 'b 1 d']:
        """`_retrieve_one` for a value that depends on earlier tokens that read the same weights."""
        context = self.conv_context
        assert buffers.queries is not None
        if begins_group and context:
            buffers.queries[:, :context] = buffers.queries[:, self.store_chunk_size :].clone()
        # later rows of the buffer belong to an earlier group, and a causal memory network does not look at them
        row = (in_chunk + 1) % self.store_chunk_size
        buffers.queries.index_copy_(1, row + context, query.to(buffers.queries.dtype))
        normed, queries = self._queries(buffers.queries)
        values = self._apply_network(buffers.weights.newest, queries)
        return self._combine(values.index_select(1, row), normed.index_select(1, row))

    def _apply_network(self, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        rows = network_rows(rows, self._dtype)
        with network_autocast(self._dtype, rows.device):
            return self._backend.apply(weights, rows)

    # storing

    def _store(
        self, call: Call, state: OpenState, prev_weights: Mapping[str, Tensor] | None, with_surprises: bool
    ) -> tuple[FastWeights, OpenState, Surprises | None]:
        pending, chunk_size = state.pending, self.store_chunk_size
        tokens = concatenated((pending.tokens, call.to_store), dim=-2)
        mask = _joined_masks(pending, call)
        schedule = Schedule.of(state.seq_index, tokens.shape[-2], chunk_size, call.batch_size)
        complete = schedule.num_chunks * chunk_size

        # convolutions see the tokens before the open chunk, or zeros before the first token
        before = pending.before
        before = tokens.new_zeros(*tokens.shape[:-2], self.conv_context, self.dim) if before is None else before
        rows = concatenated((before, tokens[..., :complete, :]), dim=-2)
        chunks, pooled = self._project_chunks(rows, None if mask is None else mask[:, :complete])
        origin = None
        if call.resets is not None:
            chunks = replaced(chunks, resets=call.resets.repeat_interleave(self.heads, dim=0))
            origin = state.weights.newest
        residual = self._weight_residual(prev_weights, pooled, state.seq_index // chunk_size, call.stores)
        with network_autocast(self._dtype, tokens.device):
            given = (chunks, residual, schedule, state.weights, self._transition)
            inputs = StoreInputs(*given, with_surprises, state.at_rest, origin)
            over_time, weights, losses = self._backend_for(call.batch_size, schedule.num_chunks).store(inputs)

        # if this call has no mask, an earlier mask is needed only until its chunk is complete
        if call.mask is None and complete > 0:
            mask = None
        # copied, so that a state that is kept does not keep the whole input alive
        rest = PendingSegment(
            tokens=tokens[..., complete:, :].clone(),
            mask=None if mask is None or tokens.shape[-2] == complete else mask[:, complete:].clone(),
            before=rows[..., complete:, :].clone() if self.conv_context else None,
        )
        after = OpenState(state.seq_index + complete, weights, rest)
        surprises = None if losses is None else self._surprises(losses, chunks.step_sizes)
        return over_time, after, surprises

    @property
    def _rows_per_chunk(self) -> int:
        """Number of rows stored per chunk."""
        return self.store_chunk_size * self.num_kv_per_token - self.store_with_lookahead_value

    def _surprises(self, losses: Float[Tensor, 'bh n m'], step_sizes: Float[Tensor, 'bh n m']) -> Surprises:
        of_rows = (
            rearrange(t[..., : self._rows_per_chunk], '(b h) n m -> b h (n m)', h=self.heads)
            for t in (losses, step_sizes)
        )
        return Surprises(*of_rows)

    def _project_chunks(
        self, tokens: Tensor, mask: Bool[Tensor, 'b _t'] | None
    ) -> tuple[Chunks, Float[Tensor, 'b n d']]:
        """Complete chunks, and one pooled row for each. `tokens` begin with the context of the convolutions."""
        normed = for_products(self.store_norm(tokens))
        seq, values_seq = normed if self.qkv_receives_diff_views else (normed, normed)
        keys, values, step_sizes, (pooled, gates) = side_by_side(
            partial(self._rows_of_chunks, seq, self.to_keys, self.k_norm),
            partial(self._rows_of_chunks, values_seq, self.to_values),
            partial(self._step_sizes, seq[:, self.conv_context :], mask),
            partial(self._gates, seq[:, self.conv_context :]),
        )
        if self.store_with_lookahead_value and keys.shape[2] > 1:
            keys, values, step_sizes = keys[..., :-1, :], values[..., 1:, :], step_sizes[..., :-1]
        elif self.store_with_lookahead_value:  # no row has a next one, so nothing is stored
            step_sizes = F.pad(step_sizes[..., :-1], (0, 1))
        return Chunks(keys=keys, values=values, step_sizes=step_sizes, **gates), pooled

    def _rows_of_chunks(
        self, seq: Float[Tensor, 'b t d'], projection: Module, norm: Module | None = None
    ) -> Float[Tensor, 'bh n m d']:
        """Keys or values of each chunk."""
        rows = rows_of_heads(seq, projection, self.split_kv_heads, norm).flatten(0, 1)
        return network_rows(rows.unflatten(1, (-1, self.store_chunk_size * self.num_kv_per_token)), self._dtype)

    def _step_sizes(self, seq: Float[Tensor, 'b t d'], mask: Bool[Tensor, 'b t'] | None) -> Float[Tensor, 'bh n m']:
        """θ of each row, in float32 at least; 0 where the mask is false."""
        chunk_size, per_token = self.store_chunk_size, self.num_kv_per_token
        logits = at_least_float32(self.to_adaptive_step(seq))
        step_sizes = self.adaptive_step_transform(logits)
        if not isinstance(step_sizes, Tensor) or step_sizes.shape != logits.shape:
            expected = f'a step size for each logit, {tuple(logits.shape)}'
            raise ValueError(f'adaptive_step_transform must return {expected}, got {described(step_sizes)}')
        step_sizes = step_sizes.unflatten(1, (-1, chunk_size * per_token))
        if mask is None:
            return step_sizes
        stored = repeat(mask, 'b (n c) -> (b h) n (c u)', h=self.heads, c=chunk_size, u=per_token)
        return torch.where(stored, step_sizes, 0.0)

    def _gates(self, seq: Float[Tensor, 'b t d']) -> tuple[Float[Tensor, 'b n d'], dict[str, Tensor | None]]:
        """A pooled row for each chunk, and the fields of `Chunks` that depend on it, in float32 at least."""
        pooled = self.reduce_to_chunk_rep(seq)
        momentum = _optional(self.to_momentum, pooled)
        modulation = _optional(self.to_layer_modulation, pooled)
        return pooled, dict(
            decay_logits=at_least_float32(self.to_decay_factor(pooled)).squeeze(-1),
            momentum_logits=momentum,
            momentum_mix=_optional(self.to_learned_momentum_combine, pooled),
            modulation=None if modulation is None else modulation * self.max_mem_layer_modulation,
            # 1 − η
            momentum_shares=(-momentum).sigmoid() if self.normalized_momentum and momentum is not None else None,
        )

    def _weight_residual(
        self,
        prev_weights: Mapping[str, Tensor] | None,
        pooled: Float[Tensor, 'b n d'],
        first_chunk: int,
        stores: bool = True,
    ) -> WeightResidual | None:
        """For each chunk, a learned share of the other memory's weights before that chunk."""
        to_mix = self.to_learned_weight_residual_mix
        if (prev_weights is None) != (to_mix is None) and (stores or to_mix is None):
            given = 'got none' if prev_weights is None else 'but this memory has accept_weight_residual=False'
            raise ValueError(f'prev_weights must be given if, and only if, accept_weight_residual=True, {given}')
        batch, num_chunks = pooled.shape[:2]
        if prev_weights is None or to_mix is None or num_chunks == 0:
            return None

        previous = self._layout.over_time('prev_weights', prev_weights, batch, pooled.device)
        first_step = self._layout.first_step('prev_weights', previous, first_chunk, num_chunks)
        return WeightResidual.of(previous, to_mix(pooled).squeeze(-1), first_step)

    @property
    def _transition(self) -> Transition:
        gate = self.transition_gate
        return Transition(None if gate is None else gate.sigmoid(), self.lookahead_gradients)

    # retrieving

    def _position_in_chunk(self, pending: PendingSegment, stores: bool) -> int:
        """Index of the next token in its chunk, by which queries are grouped. While the memory is only read, tokens
        fill no chunk, so the number of carried queries gives the index instead."""
        if stores or not self._carries_queries or pending.queries is None:
            return pending.tokens.shape[-2]
        return (pending.queries.shape[1] - self.conv_context - 1) % self.store_chunk_size

    def _query_rows(
        self, seq: Float[Tensor, 'b n d'], pending: PendingSegment, position: int
    ) -> tuple[Float[Tensor, 'b t d'], Tensor | None]:
        """`seq`, preceded by the earlier retrieval inputs that its results depend on; and the rows that the next call
        needs.

        Tokens that read the same weights form a group, which starts with the last token of a chunk. Before the very
        first token, the group starts with a row of zeros.
        """
        if not self._carries_queries and not self.conv_context:
            return seq, None

        def needed(position: int) -> int:
            """Number of rows needed before the token with this index in its chunk."""
            in_group = (position + 1) % self.store_chunk_size if self._carries_queries else 0
            return self.conv_context + in_group

        rows = torch.cat((_last_rows(pending.queries, seq, needed(position)), seq), dim=1)
        return rows, _last_rows(rows, seq, needed(position + seq.shape[1])).clone()

    def _retrieve(
        self, length: int, rows: Float[Tensor, 'b t d'], weights: FastWeights, position: int
    ) -> Float[Tensor, 'b n d']:
        """Retrieve values for the last `length` of `rows`; the first of these has index `position` in its chunk.

        `weights` begin with the weights before that chunk.
        """
        normed, queries = self._queries(rows)
        leading = int(queries.shape[1] - length)
        groups = QueryGroups.of(length, position, self.store_chunk_size, leading, whole=self._carries_queries)
        if not all(map(is_empty, groups.padding)):
            queries = F.pad(queries, (0, 0, *groups.padding))
        grouped = queries.unflatten(1, (groups.number, groups.size))
        with network_autocast(self._dtype, rows.device):
            values = self._backend.retrieve(weights, grouped, groups.first_step).flatten(1, 2)
        if values.shape[1] != length:
            end = values.shape[1] - groups.padding[1]
            values = values[:, end - length : end]
        return self._combine(values, normed[:, leading:])

    def _queries(self, rows: Float[Tensor, 'b t d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'bh n e']]:
        """Normalised rows and their queries, without the rows in front that only give context to the convolutions."""
        normed = for_products(self.retrieve_norm(rows))
        queries = self._queries_of(normed, self.to_queries)
        return normed[:, self.conv_context :], network_rows(queries, self._dtype)

    def _queries_of(self, normed: Float[Tensor, 'b t d'], projection: Module) -> Float[Tensor, 'bh n e']:
        return rows_of_heads(normed, projection, self.split_heads, self.q_norm).flatten(0, 1)

    def _combine(self, values: Float[Tensor, 'bh n e'], normed: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        """Retrieved values of all heads, gated and combined."""
        values = in_module_precision(values, self._dtype).unflatten(0, (-1, self.heads))
        # the dtype to which the projection that combines heads would cast its input
        dtype = operand_dtype(values) if self.heads > 1 else None
        return self.combine_heads(join_heads(values, self.multihead_rmsnorm, self.retrieve_gate, normed, dtype))


def _memory_network(model: Module | None, dim_head: int, default_kwargs: Mapping[str, Any]) -> Module:
    """A copy of the network given by the user, or the default network; frozen parameters become buffers."""
    if model is None:
        check_bound('default_model_kwargs', MemoryMLP, {'dim': dim_head, **default_kwargs})
        model = MemoryMLP(dim_head, **default_kwargs)
    check_memory_model(model, dim_head)
    return frozen_as_buffers(model)


def _optional(module: Module | None, x: Tensor) -> Tensor | None:
    return None if module is None else at_least_float32(module(x))


def _joined_masks(pending: PendingSegment, call: Call) -> Bool[Tensor, 'b n'] | None:
    """One mask for pending and new tokens; `None` if all of them are stored."""
    if pending.mask is None and call.mask is None:
        return None
    masks = []
    for mask, tokens in ((pending.mask, pending.tokens), (call.mask, call.to_store)):
        masks.append(tokens.new_ones(tokens.shape[-3:-1], dtype=torch.bool) if mask is None else mask)
    return torch.cat(masks, dim=-1)


def _last_rows(rows: Tensor | None, like: Float[Tensor, 'b n d'], count: int) -> Float[Tensor, 'b m d']:
    """The last `count` rows, with rows of zeros in front if there are fewer."""
    rows = like[:, :0] if rows is None else rows
    missing = max(0, count - rows.shape[1])
    return F.pad(rows, (0, 0, missing, 0))[:, rows.shape[1] + missing - count :]
