"""`NeuralMemory`: a small network whose weights are the memory (Titans, arXiv 2501.00663, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import Linear, Module, Parameter
from torch.utils.checkpoint import checkpoint

from titans_pytorch.memory.engines import (
    Chunks,
    DenseEngine,
    DualEngine,
    Engine,
    LossFn,
    Residual,
    Span,
    beside,
    choose_engine,
    default_loss_fn,
    softclamp_grad_norm,
    softclamp_max,
)
from titans_pytorch.memory.fast_weights import FastWeights, Weights
from titans_pytorch.memory.modules import (
    AttentionPool,
    AveragePool,
    HeadsFirst,
    L2Norm,
    MultiheadRMSNorm,
    gate,
    linear_from,
    pointwise,
    projection,
)
from titans_pytorch.memory.state import (
    NeuralMemState,
    OpenState,
    PendingSegment,
    StepSizes,
    StepState,
    mem_state_detach,
)
from titans_pytorch.memory.token_retrieval import Retrieval, retrieve_one
from titans_pytorch.memory.token_step import descents, predict, store_one_chunk
from titans_pytorch.memory.validation import Call, MemoryLayout, check_memory_loss, check_memory_model
from titans_pytorch.memory_models import MemoryMLP, ResidualNorm
from titans_pytorch.ops.associative_scan import AssocScan
from titans_pytorch.ops.newton_schulz import newtonschulz5
from titans_pytorch.utils.checks import (
    check_biases,
    check_callable,
    check_flags,
    check_integer,
    check_keywords,
    check_module,
    check_multiple,
    check_not_traced,
    check_number,
    check_positive,
    described,
    flags_among,
)
from titans_pytorch.utils.functional import frozen_as_buffers, on_meta, with_tensors
from titans_pytorch.utils.parameters import (
    InReferenceFormat,
    ParameterSequence,
    Resettable,
    depending_on,
    fill,
    reset_parameters,
)
from titans_pytorch.utils.precision import at_least_float32, in_module_precision, network_autocast, network_rows
from titans_pytorch.utils.shapes import Bool, Float, Int, divided

__all__ = [
    'AssocScan',
    'AttentionPool',
    'AveragePool',
    'MultiheadRMSNorm',
    'NeuralMemState',
    'NeuralMemory',
    'default_adaptive_step_transform',
    'default_loss_fn',
    'mem_state_detach',
    'newtonschulz5',
    'softclamp_grad_norm',
    'softclamp_max',
]

EMPTY = NeuralMemState(0, None, None, None, None)

Surprises = tuple[Float[Tensor, 'b h rows'], Float[Tensor, 'b h rows']]
"""Unweighted losses and step sizes of the rows stored, (batch, heads, rows)."""


def default_adaptive_step_transform(adaptive_step: Tensor, max_lr: float = 1e-2) -> Tensor:
    """Logits to step sizes in (0, max_lr)."""
    return adaptive_step.sigmoid() * max_lr


class InitialWeights(ParameterSequence):
    """The learned initial weights of a memory, in the order of its network's parameters.

    Of shape (heads, …), or (…) if the heads share them. Buffers of the network are constants, beside them.

    Args:
        network: the memory network, initialised.
        heads: how many weights there are, the same at first; `None` if heads share them.
    """

    def __init__(self, network: Module, heads: int | None):
        leading = () if heads is None else (heads,)
        weights = [p.detach().expand(*leading, *p.shape) for p in network.parameters()]
        super().__init__(w.clone(memory_format=torch.contiguous_format) for w in weights)
        self.names = [name for name, _ in network.named_parameters()]
        # in a tuple, it is not registered; on the meta device, it holds no weights
        self.template = (on_meta(network),)
        for index, constant in enumerate(network.buffers()):
            self.register_buffer(f'constant_{index}', constant)

    @property
    def network(self) -> Module:
        """The memory network as a template: without weights, with its constants."""
        template = self.template[0]
        constants = {id(empty): at_least_float32(own) for empty, own in zip(template.buffers(), self.buffers())}
        return with_tensors(template, constants) if constants else template

    def with_weights(self, weights: Mapping[str, Tensor]) -> Module:
        """The memory network with weights, by name."""
        return with_tensors(self.network, {id(p): weights[name] for name, p in self.template[0].named_parameters()})

    def forward(self) -> dict[str, Tensor]:
        """The weights by name. Called rather than read, so that hooks bring in parameters that are offloaded."""
        return dict(zip(self.names, self))

    def reset_parameters(self) -> None:
        """Draw them anew, by the `reset_parameters()` of the network's modules."""
        network = deepcopy(self.template[0]).to_empty(device=self[0].device)
        reset_parameters(network)
        drawn = dict(network.named_parameters())
        for name, weight in zip(self.names, self):
            fill(weight, drawn[name])
        for constant, value in zip(self.buffers(), network.buffers()):
            fill(constant, value)


class NeuralMemory(Resettable, InReferenceFormat):
    """A memory that learns at test time.

    Each token yields a key, a value and a query. Storing is gradient descent of the memory network M on
    ‖M(k) − v‖², chunk by chunk, with momentum (the surprise S carries over) and forgetting:

        S_t = η_t S_{t−1} − θ_t ∇‖M(k_t) − v_t‖²          (Titans eq. 10)
        M_t = (1 − α_t) M_{t−1} + S_t                      (eq. 13)

    where the step size θ is learned per token, momentum η and forgetting α per chunk. Retrieving is M(q). Token t
    (counted from 0 over all calls) reads the weights after ⌊(t + 1) / chunk⌋ complete chunks, so the result does not
    depend on how a sequence is cut into calls.

    Two lengths govern when weights change. A **chunk** is stored as one step: gradients of its tokens are summed and
    it has one η and one α. A **memory batch** is a run of chunks whose gradients are all taken at the same base
    weights, those at its start; this is what lets them run in parallel. Positions are counted over all calls.

    Args:
        dim: width of the input and of the output.
        chunk_size: tokens per chunk. A pair is (retrieve, store): the store size is the chunk; the other only names
            how queries are grouped and changes no number.
        batch_size: tokens per memory batch, a multiple of the chunk size. `None`: the base weights never move on,
            and every gradient is taken at the initial weights.
        dim_head: width of a head; `dim` by default, and necessarily so with one head.
        heads: independent memories side by side, their outputs combined by a learned projection and gate.
        model: the memory network, any module which maps (tokens, dim_head) to the same shape, has no buffers and, if
            it mixes tokens, is causal. Default: `MemoryMLP(dim_head, **default_model_kwargs)`. Its weights with
            `requires_grad=False` are constants, which neither the memory nor an optimizer changes.
        store_memory_loss_fn: (prediction, target) to one loss a token. Default: mean squared error.
        adaptive_step_transform: step-size logits to step sizes. Default: sigmoid times `default_step_transform_max_lr`.
        default_step_transform_max_lr: the largest step size. A chunk is one step on the sum of its tokens' gradients,
            and a memory batch takes all of its steps at the same weights: the longer either is, the smaller this must
            be. `train_mac.py` uses 0.1 at chunks of 4 and memory batches of 128.
        per_parameter_lr_modulation: learn a factor in (0, `max_mem_layer_modulation`) on the step of each parameter.
        max_mem_layer_modulation: the largest such factor.
        per_head_learned_parameters: initial weights of their own for each head, instead of shared ones.
        attn_pool_chunks: pool a chunk for its gates by learned attention instead of the mean.
        momentum: carry surprise over chunks.
        momentum_order: how many times momentum is applied to itself.
        learned_momentum_combine: mix the orders by learned weights, instead of using the last.
        learned_combine_include_zeroth: let the plain surprise take part in that mix.
        num_kv_per_token: keys and values each token stores.
        qkv_receives_diff_views: the input is (3, batch, length, dim), for queries, keys and values.
        pre_rmsnorm: RMS norm of the input.
        post_rmsnorm: RMS norm of what is retrieved, per head.
        qk_rmsnorm: RMS norm of queries and keys, per head; advised for stability.
        max_grad_norm: move the norm x of each parameter's gradient in each chunk to (tanh(2x / max) + 1) · max / 2,
            so that it lies between half of this and all of it; small gradients grow. One below 64 machine epsilons of
            `max_grad_norm` is left as it is: where terms cancel, all that remains is rounding.
        use_accelerated_scan: run the dense engine's recurrences in a Triton kernel where there is a GPU. The dual
            engine has none to run.
        activation: applied to queries, keys and values.
        init_adaptive_step_bias: start with step sizes the same for every token, at this logit.
        init_momentum_bias: the same for momentum.
        init_decay_bias: the same for forgetting, which also wears away the initial weights. By default it starts near
            a half per chunk, which a deep memory may not survive; −3 or so keeps memory long at first.
        accept_weight_residual: take the gradients at base weights plus a learned share of another memory's weights
            (`prev_weights`).
        spectral_norm_surprises: orthogonalise each chunk's momentum by Newton–Schulz (Muon) before it is applied. Its
            size, and with it that of the steps, then no longer matters, except for parameters that are no matrices.
        gated_transition: let the base weights move only part of the way at the end of a memory batch, by a learned
            share that starts at sigmoid(−5).
        mem_model_norm_add_residual: wrap the network as LN(f(x)) + x (TTT).
        store_with_lookahead_value: pair each key with the value of the next row in its chunk, for one key per token the
            next token's (arXiv 2601.00671). The last row of a chunk stores nothing, so that chunks of a single row
            never do.
        default_model_kwargs: arguments of the default network.
        engine: how the memory is computed. 'dual' never forms a weight matrix per chunk, and serves networks that
            send their products through `linear`; 'dense' forms them all, and serves any network; 'auto' is dual
            where it can serve. The numbers are the same.
        qk_l2norm: queries and keys of length 1, per head, in place of `qk_rmsnorm` (Titans, section 4.4).
        conv_kernel: width of a depthwise causal convolution after each of the projections to queries, keys and values,
            before the activation; the paper's architectures have one, after Mamba of width 4. A state then also holds
            the tokens that it reaches.
        channel_gate: gate what is retrieved for each channel, instead of each head; with one head, too.
        checkpoint_every: keep only the state after every so many tokens for the backward, which computes the rest
            again (activation checkpointing). What a training step holds is then one such stretch and a state for each,
            for a third more work; `state.updates` is `None`. Needs the dual engine. Default: keep everything.

    Raises:
        ValueError, TypeError: for arguments that do not fit, naming the argument, what was expected and what came.
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
    ):
        super().__init__()
        dim, dim_head, heads, num_kv_per_token, momentum_order = check_positive(
            dim=dim,
            dim_head=dim if dim_head is None else dim_head,
            heads=heads,
            num_kv_per_token=num_kv_per_token,
            momentum_order=momentum_order,
        )
        retrieve_chunk_size, store_chunk_size = _checked_chunk_sizes(chunk_size)
        if batch_size is not None:
            batch_size = check_multiple('batch_size', batch_size, 'chunk_size', store_chunk_size)
        check_flags(**flags_among(locals(), NeuralMemory))
        check_module(model=model, activation=activation)
        check_callable(store_memory_loss_fn=store_memory_loss_fn)
        if adaptive_step_transform is not None:
            check_callable(adaptive_step_transform=adaptive_step_transform)
        check_keywords(default_model_kwargs=default_model_kwargs)
        max_lr = check_number('default_step_transform_max_lr', default_step_transform_max_lr, above=0)
        max_modulation = check_number('max_mem_layer_modulation', max_mem_layer_modulation, above=0)
        max_grad_norm = None if max_grad_norm is None else check_number('max_grad_norm', max_grad_norm, above=0)
        check_biases(
            init_adaptive_step_bias=init_adaptive_step_bias,
            init_momentum_bias=init_momentum_bias,
            init_decay_bias=init_decay_bias,
        )
        if heads == 1 and dim_head != dim:
            raise ValueError(f'dim_head must equal dim={dim} when heads is 1, got {dim_head}')
        if attn_pool_chunks and store_chunk_size == 1:
            raise ValueError('attn_pool_chunks needs a chunk_size above 1: a chunk of one token has nothing to pool')
        if learned_momentum_combine and not (momentum and momentum_order > 1):
            raise ValueError(
                'learned_momentum_combine needs momentum=True and momentum_order of at least 2, '
                f'got momentum={momentum}, momentum_order={momentum_order}'
            )
        if qk_l2norm and qk_rmsnorm:
            raise ValueError('qk_l2norm and qk_rmsnorm are two norms for one place: choose one of them')
        if conv_kernel is not None:
            conv_kernel = check_integer('conv_kernel', conv_kernel, 1)
        if checkpoint_every is not None:
            checkpoint_every = check_integer('checkpoint_every', checkpoint_every, 1)
            if accept_weight_residual:
                raise ValueError('checkpoint_every keeps no weights over time, which accept_weight_residual needs')
        if init_momentum_bias is not None and not momentum:
            raise ValueError('init_momentum_bias needs momentum=True')
        if store_with_lookahead_value and store_chunk_size * num_kv_per_token == 1:
            warnings.warn('store_with_lookahead_value with chunks of a single row stores nothing', stacklevel=2)

        self.dim = dim
        self.heads = heads
        is_pair = isinstance(chunk_size, (tuple, list))
        self.chunk_size = (retrieve_chunk_size, store_chunk_size) if is_pair else store_chunk_size
        self.retrieve_chunk_size, self.store_chunk_size = retrieve_chunk_size, store_chunk_size
        self.batch_size = batch_size
        self.checkpoint_every = checkpoint_every
        self.num_kv_per_token = num_kv_per_token
        self.qkv_receives_diff_views = qkv_receives_diff_views
        self.store_with_lookahead_value = store_with_lookahead_value
        self.momentum_order = momentum_order
        self.max_mem_layer_modulation = max_modulation
        self.max_grad_norm = max_grad_norm
        self.spectral_norm_surprises = spectral_norm_surprises
        self.use_accelerated_scan = use_accelerated_scan
        self.per_head_learned_parameters = per_head_learned_parameters
        self.store_memory_loss_fn = store_memory_loss_fn
        self.adaptive_step_transform = adaptive_step_transform or partial(
            default_adaptive_step_transform, max_lr=max_lr
        )

        # the memory

        rows = max(1, store_chunk_size * num_kv_per_token - store_with_lookahead_value)
        check_memory_loss(store_memory_loss_fn, (rows, dim_head))
        model = MemoryMLP(dim_head, **default_model_kwargs) if model is None else model
        check_memory_model(model, dim_head)
        model = frozen_as_buffers(model)
        model = ResidualNorm(dim_head, model) if mem_model_norm_add_residual else model
        self._engine_class = choose_engine(engine, model, dim_head)
        if checkpoint_every is not None and self._engine_class is DenseEngine:
            # its gradients are those of torch.func, which keeps what it saves: nothing would be gained
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
        self.conv_reach = 0 if conv_kernel is None else conv_kernel - 1
        norm = partial(MultiheadRMSNorm, dim_head, heads) if qk_rmsnorm else L2Norm if qk_l2norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.split_kv_heads = Rearrange('b n (h u d) -> b h (n u) d', h=heads, u=num_kv_per_token)

        # what is retrieved

        self.multihead_rmsnorm = MultiheadRMSNorm(dim_head, heads) if post_rmsnorm else nn.Identity()
        self.combine_heads = Linear(dim_inner, dim, bias=False) if heads > 1 else nn.Identity()
        num_gates = dim_inner if channel_gate else heads if heads > 1 else 0
        self.retrieve_gate = (
            nn.Sequential(Linear(dim, num_gates, bias=False), HeadsFirst(heads), nn.Sigmoid()) if num_gates else None
        )

        # gates: step sizes per key, the rest per chunk

        gates = partial(gate, dim, heads)
        mixed_orders = momentum_order + learned_combine_include_zeroth
        self.reduce_to_chunk_rep = (
            AttentionPool(dim, store_chunk_size) if attn_pool_chunks else AveragePool(store_chunk_size)
        )
        self.to_adaptive_step = nn.Sequential(
            linear_from(dim, heads * num_kv_per_token, init_adaptive_step_bias),
            Rearrange('b n (h u) -> (b h) (n u)', u=num_kv_per_token),
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

    # the reference's checkpoints, which hold the memory network twice

    scalars = ('transition_gate',)

    def write_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        if next(self.memory_model_parameters.buffers(), None) is not None:
            raise ValueError('module must have no memory network with frozen parts, which the reference trains')
        super().write_reference(state_dict, prefix)
        for index, name in enumerate(self.memory_model_parameter_names):
            weight = state_dict[f'{prefix}memory_model_parameters.{index}']
            # head 0's, for a module that is never trained, unless heads share their weights
            first = weight[0] if self.per_head_learned_parameters else weight
            state_dict[f'{prefix}memory_model.{name}'] = first.clone()

    def read_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        super().read_reference(state_dict, prefix)
        one_tensor = not self.per_head_learned_parameters or self.heads == 1
        for index, name in enumerate(self.memory_model_parameter_names):
            copy = state_dict.pop(f'{prefix}memory_model.{name}', None)
            key = f'{prefix}memory_model_parameters.{index}'
            # both names are of one tensor there, and a file that keeps tensors once may have either
            if copy is not None and one_tensor and key not in state_dict and copy.shape == self._parameter_shapes[name]:
                state_dict[key] = copy.reshape(self.init_weight_shape[index])

    # the memory network and its weights

    def _hold(self, model: Module) -> None:
        """Take over a memory network: its weights as learned initial ones, the rest as a template."""
        self._parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.memory_model_parameters = InitialWeights(model, self.heads if self.per_head_learned_parameters else None)
        self.memory_model_parameter_names = self.memory_model_parameters.names
        self.num_memory_parameter_tensors = len(self.memory_model_parameters)
        self.init_weight_shape = [tuple(p.shape) for p in self.memory_model_parameters]

    @property
    def memory_model(self) -> Module:
        """The memory network with the learned initial weights of the first head: an empty memory, to call or look at.

        It is made anew at every access. Its weights are views of `memory_model_parameters`, which are what trains.
        """
        initial = zip(self.memory_model_parameter_names, self.memory_model_parameters)
        first = {name: w[0] if self.per_head_learned_parameters else w.view_as(w) for name, w in initial}
        return self.memory_model_parameters.with_weights(first)

    @property
    def _network(self) -> Module:
        """The memory network without weights, which are given at every use."""
        return self.memory_model_parameters.network

    @property
    def memory_model_parameter_dict(self) -> TensorDict:
        """The learned initial weights by name: (h, …), or (…) if the heads share them."""
        return TensorDict(self.memory_model_parameters())

    def train(self, mode: bool = True) -> NeuralMemory:
        self.memory_model_parameters.template[0].train(mode)
        return super().train(mode)

    @property
    def _dtype(self) -> torch.dtype:
        """The precision of the module. Parameters may be on another device than a call's tensors: offloaded ones are
        brought in for a call of the module that holds them."""
        return self.memory_model_parameters[0].dtype

    def init_weights(self, batch: int) -> TensorDict:
        """Weights of an empty memory, per parameter (batch · heads, …), in float32 at least."""
        count = batch if self.per_head_learned_parameters else batch * self.heads
        named = self.memory_model_parameters()
        # always copies: a state keeps them, and an optimizer changes the parameters in place
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
            conv_reach=self.conv_reach,
            dtype=self._dtype,
            parameters=self._parameter_shapes,
        )

    @property
    def _engine(self) -> Engine:
        return self._engine_class(
            self._network,
            self.store_memory_loss_fn,
            self.assoc_scan,
            self.max_grad_norm,
            self.spectral_norm_surprises,
        )

    @property
    def mixes_tokens(self) -> bool:
        """Whether the memory network's result for a row depends on other rows."""
        return not getattr(self._network, 'rowwise', False)

    @property
    def _carries_queries(self) -> bool:
        """Whether a query's result depends on the queries before it that read the same weights."""
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
    ) -> Any:
        """Store a piece of a sequence, and retrieve for each of its tokens what the memory then knows.

        Args:
            seq: (batch, length, dim); (3, batch, length, dim), the views for queries, keys and values, if
                `qkv_receives_diff_views`. Without the length axis, (batch, dim), it is a sequence of one token.
            store_seq: what to store, if it is not `seq`; (2, batch, length, dim) with different views.
            state: that of the call before. Pieces of any length may follow one another.
            detach_mem_state: cut the returned state from the graph.
            prev_weights: another memory's `state.updates`, if `accept_weight_residual`: over the tokens of this call,
                or over the sequence from its first token on, this call's included.
            store_mask: which tokens to store: booleans, or the integers 0 and 1, (batch, length). A masked token still
                takes part in its chunk: it has step size 0, but the chunk counts it, and forgets when it is complete.
                To leave the memory as it is, see `store`.
            return_surprises: also return losses and step sizes, (batch, heads, rows) each, of the chunks completed.
            ttt_batch_size: memory-batch length for this call, in place of `batch_size`.
            cache: another name for `state`.
            store: false to read without writing: all tokens read the weights after the last complete chunk, and the
                state keeps its weights, momentum, position and open chunk. Queries go on: for convolutions, and for a
                memory network that mixes tokens, which sees groups of a chunk's length.

        Returns:
            what was retrieved, (batch, length, dim), of a single token (batch, 1, dim); the state; and with
            `return_surprises` the pair of surprises.

        Raises:
            ValueError, TypeError: for inputs and states that do not fit, naming the argument.
        """
        check_not_traced(type(self).__name__)
        if cache is not None:
            if state is not None:
                raise ValueError('state and cache are two names for one argument: give one of them')
            state = cache

        check_flags(detach_mem_state=detach_mem_state, return_surprises=return_surprises, store=store)
        if not store and (store_seq is not None or store_mask is not None):
            raise ValueError('store=False stores nothing: leave out store_seq and store_mask')
        call = self._layout.call(seq, store_seq, store_mask, ttt_batch_size, self.batch_size)
        call = call if store else call.read_only()
        state = EMPTY if state is None else state
        if self.checkpoint_every is not None and torch.is_grad_enabled():
            pieces = call.pieces(self.checkpoint_every)
            retrieved, next_state, surprises = self._checkpointed(pieces, state, prev_weights)
        else:
            retrieved, next_state, surprises = self._forward(call, state, prev_weights)
        # a later call has no use for the initial weights, and a short one completes no chunk
        retrieved = depending_on(self.parameters(), retrieved)
        next_state = next_state.detach() if detach_mem_state else next_state
        return (retrieved, next_state, surprises) if return_surprises else (retrieved, next_state)

    def _forward(
        self, call: Call, state: NeuralMemState, prev_weights: Mapping[str, Tensor] | None
    ) -> tuple[Float[Tensor, 'b n d'], NeuralMemState, Surprises]:
        before = self._opened(state, call.queries)
        weights, after, surprises = self._store(call, before, prev_weights)
        in_group = self._num_in_group(before.pending, stores=call.store.shape[-2] > 0)
        rows, carried = self._query_rows(call.queries, before.pending, in_group)
        retrieved = self._retrieve(call.queries.shape[1], rows, weights, in_group)

        after = after._replace(pending=after.pending._replace(queries=carried))
        return retrieved, after.closed(weights), surprises

    def _checkpointed(
        self, pieces: Iterable[Call], state: NeuralMemState, prev_weights: Mapping[str, Tensor] | None
    ) -> tuple[Float[Tensor, 'b n d'], NeuralMemState, Surprises]:
        """Piece after piece, each of them computed again in the backward."""

        def forward(piece: Call, state: NeuralMemState) -> Any:
            retrieved, after, surprises = self._forward(piece, state, prev_weights)
            return retrieved, after._replace(updates=None), surprises

        retrieved, surprises = [], []
        for piece in pieces:
            out, state, surprise = checkpoint(forward, piece, state, use_reentrant=False)
            retrieved.append(out)
            surprises.append(surprise)
        losses, step_sizes = (torch.cat(parts, dim=-1) for parts in zip(*surprises))
        return torch.cat(retrieved, dim=1), state, (losses, step_sizes)

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
        """Store complete chunks of `seq` with all gradients at `weights`, retrieving nothing.

        `past_state` is (weights, momentum) to go on from, `seq_index` the position of the first token, by which
        `prev_weights` over a whole sequence are aligned. Returns the weights over time, per parameter
        (bh, chunks + 1, …), the state, whose `cache_store_segment` holds the tokens of an incomplete chunk, and with
        `return_surprises` the surprises.
        """
        check_flags(return_surprises=return_surprises)
        self._layout.check_store('seq', seq)
        mask = self._layout.checked_mask('mask', mask, seq)
        queries = seq[0] if self.qkv_receives_diff_views else seq

        before = self._opened(
            (seq_index, weights, None, past_state, None), queries, names=('seq_index', 'weights', 'past_state')
        )
        over_time, after, surprises = self._store(Call(queries, seq, mask, None), before, prev_weights)
        next_state = after.closed(over_time)
        return (next_state.updates, next_state, *((surprises,) if return_surprises else ()))

    def retrieve_memories(self, seq: Float[Tensor, 'b n d'], weights: Mapping[str, Tensor]) -> Float[Tensor, 'b n d']:
        """What `weights` know of `seq`, which begins at a chunk's start.

        `weights` per parameter: (bh, chunks + 1, …), as `state.updates`, of which token t reads entry
        ⌊(t + 1) / chunk⌋; or (bh, …), as `state.weights`; or the initial weights.
        """
        self._layout.check_rows('seq', seq)
        over_time = self._layout.over_time('weights', weights, seq.shape[0])
        rows, _ = self._query_rows(seq, self._layout.no_pending(seq), 0)
        return self._retrieve(seq.shape[1], rows, over_time, 0)

    def recall(
        self, seq: Float[Tensor, 'b n d'], state: NeuralMemState | StepState | None = None
    ) -> Float[Tensor, 'b n d']:
        """What the memory knew of `seq` when its open memory batch began: M(q) with the base weights, without storing.

        Each row is asked for by itself, so there is no convolution.

        Raises:
            ValueError: if the memory network mixes tokens.
        """
        if self.mixes_tokens:
            raise ValueError('recall asks for each row by itself, and this memory network mixes them')
        self._layout.check_rows('seq', seq)
        if isinstance(state, StepState):
            base = state.base
        else:
            base = self._opened(EMPTY if state is None else state, seq).base
        normed = self.retrieve_norm(seq)
        queries = self._queries_of(pointwise(self.to_queries)(normed))
        return self._combined(self._predict(base, queries), normed)

    def _opened(self, state: Any, seq: Float[Tensor, 'b n d'], **names: Any) -> OpenState:
        init_momentum = self.init_momentum if self.to_momentum is not None else lambda batch: TensorDict({})
        return self._layout.opened(state, seq, self.init_weights, init_momentum, **names)

    # one token at a time, without gradients, over buffers of constant size

    @property
    def step_sizes(self) -> StepSizes:
        """How long the buffers of a `StepState` are."""
        group = self.store_chunk_size if self._carries_queries else 0
        return StepSizes(self.store_chunk_size, self.conv_reach, group)

    def step_state(self, state: NeuralMemState) -> StepState:
        """`state` as buffers for `step`; `StepState.closed` is the way back."""
        pending = state.cache_store_segment
        tokens = pending.tokens if isinstance(pending, PendingSegment) else pending
        assert tokens is not None
        opened = self._opened(state, tokens[0] if self.qkv_receives_diff_views else tokens)
        return StepState.of(opened, self.step_sizes)

    def step(
        self,
        seq: Float[Tensor, 'b 1 d'] | Float[Tensor, 'v b 1 d'],
        state: StepState,
        in_chunk: Int[Tensor, ' 1'],
        ends_chunk: bool,
        ends_batch: bool,
        prev_weights: Weights | None = None,
    ) -> tuple[Float[Tensor, 'b 1 d'], StepState]:
        """`forward` for token number `in_chunk` of a chunk, which ends it, and with it a memory batch, or does not.

        Writes the token into the buffers of `state`. Where a chunk ends its weights are new tensors, in the state
        that is returned: another memory may still have to read the old ones (`prev_weights`, (bh, …) by parameter).
        """
        query, store = (seq[0], seq[1:]) if self.qkv_receives_diff_views else (seq, seq)
        if ends_chunk:
            tokens = torch.cat((state.pending, store), dim=-2)
            state = self._stored_chunk(tokens, state, ends_batch, prev_weights)
            state.pending[..., : self.conv_reach, :] = tokens[..., self.store_chunk_size :, :]
        else:
            index = in_chunk + self.conv_reach if self.conv_reach else in_chunk
            state.pending.index_copy_(-2, index, store.to(state.pending.dtype))
        return self._retrieve_one(query, state, in_chunk, ends_chunk), state

    def _stored_chunk(
        self, tokens: Tensor, state: StepState, ends_batch: bool, prev_weights: Weights | None
    ) -> StepState:
        chunk, pooled = self._normed_chunks(tokens, None)
        at = state.base
        if self.to_learned_weight_residual_mix is not None:
            assert prev_weights is not None
            shares = self.to_learned_weight_residual_mix(pooled).flatten()
            at = {name: torch.addcmul(w, beside(shares, w), prev_weights[name]) for name, w in at.items()}

        broadcasts = self._engine_class is DualEngine
        with network_autocast(self._dtype, tokens.device):
            last, momentum = store_one_chunk(
                descents(self._network, self.store_memory_loss_fn, chunk, at, broadcasts),
                chunk,
                state.last,
                state.momentum,
                self.max_grad_norm,
                self.spectral_norm_surprises,
            )
        base = state.base
        if ends_batch:
            base = last = self._transition(base, last)
        return state._replace(base=base, last=last, momentum=momentum)

    def _retrieve_one(
        self, query: Float[Tensor, 'b 1 d'], state: StepState, in_chunk: Int[Tensor, ' 1'], begins_group: bool
    ) -> Float[Tensor, 'b 1 d']:
        reach = self.conv_reach
        if not self._carries_queries:
            rows = query if state.queries is None else torch.cat((state.queries, query), dim=1)
            if state.queries is not None:
                state.queries.copy_(rows[:, 1:])
            normed = self.retrieve_norm(rows)
            parts = Retrieval(
                self.heads,
                self._network,
                self._engine_class is DualEngine,
                self.q_norm,
                self.multihead_rmsnorm,
                self.retrieve_gate,
                self._dtype,
            )
            retrieved = retrieve_one(parts, state.last, self.to_queries(normed), normed[:, self.conv_reach :])
            return self.combine_heads(retrieved)

        assert state.queries is not None
        if begins_group and reach:
            state.queries[:, :reach] = state.queries[:, self.store_chunk_size :].clone()
        # rows beyond this one are of an earlier group: a causal memory model does not look at them
        row = (in_chunk + 1) % self.store_chunk_size
        state.queries.index_copy_(1, row + reach, query.to(state.queries.dtype))
        normed, queries = self._queries(state.queries)
        values = self._predict(state.last, queries)
        return self._combined(values.index_select(1, row), normed.index_select(1, row))

    def _predict(self, weights: Weights, rows: Float[Tensor, 'bh m d']) -> Float[Tensor, 'bh m d']:
        with network_autocast(self._dtype, rows.device):
            rows = network_rows(rows, self._dtype)
            return predict(self._network, weights, rows, broadcasts=self._engine_class is DualEngine)

    # storing

    def _store(
        self, call: Call, state: OpenState, prev_weights: Mapping[str, Tensor] | None
    ) -> tuple[FastWeights, OpenState, Surprises]:
        tokens = torch.cat((state.pending.tokens, call.store), dim=-2)
        mask = _joined_masks(state.pending, call)
        num_chunks, _ = divided(tokens.shape[-2], self.store_chunk_size)
        complete = num_chunks * self.store_chunk_size

        # a convolution reaches tokens before the open chunk; before the first token there are zeros
        before = state.pending.before
        before = tokens.new_zeros(*tokens.shape[:-2], self.conv_reach, self.dim) if before is None else before
        complete_rows = torch.cat((before, tokens[..., :complete, :]), dim=-2)
        chunks, pooled = self._normed_chunks(complete_rows, None if mask is None else mask[:, :complete])
        residual = self._weight_residual(prev_weights, pooled, state.seq_index // self.store_chunk_size)
        base, last = state.base, state.last
        momentum = {name: [*orders] for name, orders in state.momentum.items()}
        engine = self._engine
        pieces, losses = [], [torch.zeros_like(chunks.step_sizes[:, :0])]

        if isinstance(num_chunks, torch.SymInt):
            # one graph for all lengths, as `torch.export` makes it, unrolls no chunks
            runs, ends_batch = [], self._ends_batch(state.seq_index, num_chunks, call.batch_size, tokens.device)
            with network_autocast(self._dtype, tokens.device):
                stored, base = engine.scanned(chunks, residual, ends_batch, base, last, momentum, self._transition)
            pieces, losses, last, momentum = [stored.weights], [stored.losses], stored.weights.end, stored.momentum
        else:
            run_length = engine.run_length(tokens.device, self.store_chunk_size * self.num_kv_per_token)
            at_newest = all(base[name] is w for name, w in last.items())
            spans = self._spans(state.seq_index, num_chunks, call.batch_size, run_length, at_newest)
            runs = engine.runs(chunks, residual, spans, last)
        with network_autocast(self._dtype, tokens.device):
            for run in runs:
                stored = engine.store(run, base, last, momentum)
                pieces.append(stored.weights)
                losses.append(stored.losses)
                last, momentum = stored.weights.end, stored.momentum
                if run.ends_batch:
                    base = last = self._transition(base, last)

        # copied, so that a kept state does not keep the whole input
        rest = PendingSegment(
            tokens[..., complete:, :].clone(),
            None if mask is None else mask[:, complete:].clone(),
            before=complete_rows[..., complete:, :].clone() if self.conv_reach else None,
        )
        stacked = {name: torch.stack(orders) for name, orders in momentum.items()}
        after = OpenState(state.seq_index + complete, base, last, stacked, rest)

        def by_row(t: Float[Tensor, 'bh n m']) -> Float[Tensor, 'b h rows']:
            return rearrange(t[..., :rows_stored], '(b h) n m -> b h (n m)', h=self.heads)

        rows_stored = self.store_chunk_size * self.num_kv_per_token - self.store_with_lookahead_value
        surprises = by_row(torch.cat(losses, dim=1)), by_row(chunks.step_sizes)
        return FastWeights.joined(pieces, last), after, surprises

    def _spans(
        self, seq_index: int, num_chunks: int, batch_size: int | None, run_length: int | None, at_newest: bool
    ) -> list[Span]:
        """The chunks of a call, cut where memory batches end, and where a span has the chunks that the engine likes
        best. `at_newest`: whether the base weights of the first are the newest ones."""
        chunk = seq_index // self.store_chunk_size
        end = chunk + num_chunks
        per_batch = None if batch_size is None else batch_size // self.store_chunk_size
        spans: list[Span] = []
        while chunk < end:
            length = end - chunk if run_length is None else min(end - chunk, run_length)
            left_of_batch = None
            if per_batch is not None:
                left_of_batch = per_batch - chunk % per_batch
                length = min(length, left_of_batch)
            # with a gate the next one does not begin with the weights that this one ends with
            whole = length == per_batch and self.transition_gate is None and (at_newest or bool(spans))
            spans.append(Span(length, whole, length == left_of_batch))
            chunk += length
        return spans

    def _ends_batch(
        self, seq_index: int, num_chunks: int, batch_size: int | None, device: torch.device
    ) -> Bool[Tensor, '1 n']:
        """Whether a memory batch ends with each chunk of a call."""
        if batch_size is None:
            return torch.zeros(1, num_chunks, dtype=torch.bool, device=device)
        ends = torch.arange(1, num_chunks + 1, device=device) * self.store_chunk_size + seq_index
        return (ends % batch_size == 0).unsqueeze(0)

    def _normed_chunks(
        self, tokens: Tensor, mask: Bool[Tensor, 'b _t'] | None
    ) -> tuple[Chunks, Float[Tensor, 'b n d']]:
        """What complete chunks ask to be learned, and a row for each; before them are tokens for the convolution."""
        normed = self.store_norm(tokens)
        keys_seq, values_seq = normed if self.qkv_receives_diff_views else (normed, normed)
        pooled = self.reduce_to_chunk_rep(keys_seq[:, self.conv_reach :])
        return self._chunks(keys_seq, values_seq, pooled, mask), pooled

    def _chunks(
        self,
        seq: Float[Tensor, 'b t d'],
        values_seq: Float[Tensor, 'b t d'],
        pooled: Float[Tensor, 'b n d'],
        mask: Bool[Tensor, 'b _t'] | None,
    ) -> Chunks:
        """Keys, values and gates of complete chunks; `pooled` has a row for each chunk."""
        chunk_size, rows = self.store_chunk_size, self.store_chunk_size * self.num_kv_per_token
        keys = self.k_norm(self.split_kv_heads(self.to_keys(seq)))
        values = self.split_kv_heads(self.to_values(values_seq))
        keys, values = (rearrange(t, 'b h (n m) d -> (b h) n m d', m=rows) for t in (keys, values))
        keys, values = (network_rows(t, self._dtype) for t in (keys, values))

        # gates in float32 under any autocast, and of a module in half precision
        step_logits = at_least_float32(self.to_adaptive_step(seq[:, self.conv_reach :]))
        step_sizes = self.adaptive_step_transform(step_logits)
        if not isinstance(step_sizes, Tensor) or step_sizes.shape != step_logits.shape:
            expected = f'a step size for each logit, {tuple(step_logits.shape)}'
            raise ValueError(f'adaptive_step_transform must return {expected}, got {described(step_sizes)}')
        step_sizes = rearrange(step_sizes, 'bh (n m) -> bh n m', m=rows)
        if mask is not None:
            stored = repeat(mask, 'b (n c) -> (b h) n (c u)', h=self.heads, c=chunk_size, u=self.num_kv_per_token)
            step_sizes = torch.where(stored, step_sizes, 0.0)

        if self.store_with_lookahead_value and rows > 1:
            keys, values, step_sizes = keys[..., :-1, :], values[..., 1:, :], step_sizes[..., :-1]
        elif self.store_with_lookahead_value:  # no row has a next one; a step size of 0 stores nothing
            step_sizes = F.pad(step_sizes[..., :-1], (0, 1))

        modulation = _optional(self.to_layer_modulation, pooled)
        return Chunks(
            keys=keys,
            values=values,
            step_sizes=step_sizes,
            decay=at_least_float32(self.to_decay_factor(pooled)).squeeze(-1),
            momentum=_optional(self.to_momentum, pooled),
            momentum_mix=_optional(self.to_learned_momentum_combine, pooled),
            modulation=None if modulation is None else modulation * self.max_mem_layer_modulation,
        )

    def _weight_residual(
        self, prev_weights: Mapping[str, Tensor] | None, pooled: Float[Tensor, 'b n d'], first_chunk: int
    ) -> Residual | None:
        """A learned share, per chunk, of the other memory's weights before that chunk."""
        to_mix = self.to_learned_weight_residual_mix
        if (prev_weights is None) != (to_mix is None):
            given = 'got none' if prev_weights is None else 'but this memory has accept_weight_residual=False'
            raise ValueError(f'prev_weights must be given exactly where accept_weight_residual=True, {given}')
        batch, num_chunks = pooled.shape[:2]
        if prev_weights is None or to_mix is None or num_chunks == 0:
            return None

        previous = self._layout.over_time('prev_weights', prev_weights, batch)
        first_step = self._layout.first_step('prev_weights', previous, first_chunk, num_chunks)
        return Residual.of(previous, to_mix(pooled).squeeze(-1), first_step)

    def _transition(self, base: Weights, last: Weights) -> Weights:
        """Base weights of the next memory batch."""
        if self.transition_gate is None:
            return last
        share = self.transition_gate.sigmoid()
        return {name: w.lerp(last[name], share.to(w.dtype)) for name, w in base.items()}

    # retrieving

    def _num_in_group(self, pending: PendingSegment, stores: bool) -> int:
        """Number of the next token in its chunk, by which queries are grouped: while the memory is only read, where
        tokens fill no chunk, by the queries before."""
        if stores or not self._carries_queries or pending.queries is None:
            return pending.tokens.shape[-2]
        return (pending.queries.shape[1] - self.conv_reach - 1) % self.store_chunk_size

    def _query_rows(
        self, seq: Float[Tensor, 'b n d'], pending: PendingSegment, num_pending: int
    ) -> tuple[Float[Tensor, 'b t d'], Tensor | None]:
        """Retrieval inputs from the first that reads the same weights as `seq` begins with; and those to carry on.

        The group of tokens that read one set of weights starts on the last token of a chunk; before the first token
        of all it starts with a row of zeros.
        """
        if not self._carries_queries and not self.conv_reach:
            return seq, None

        def needed(num_pending: int) -> int:
            """Rows before the next token."""
            return self.conv_reach + self._carries_queries * ((num_pending + 1) % self.store_chunk_size)

        rows = torch.cat((_last_rows(pending.queries, seq, needed(num_pending)), seq), dim=1)
        return rows, _last_rows(rows, seq, needed(num_pending + seq.shape[1])).clone()

    def _retrieve(
        self,
        length: int,
        rows: Float[Tensor, 'b t d'],
        weights: FastWeights,
        num_pending: int,
    ) -> Float[Tensor, 'b n d']:
        """The last `length` of `rows`, each through the weights it may read.

        The first token is number `num_pending` of its chunk. `weights` start with those before that chunk.
        """
        chunk_size = self.store_chunk_size
        first_step, before = divided(num_pending, chunk_size, offset=1)

        normed, queries = self._queries(rows)

        # group the queries by the weights they read
        lead, group_size = before - int(queries.shape[1] - length), chunk_size
        if not isinstance(length, torch.SymInt):
            group_size = min(chunk_size, before + length)
            if not self._carries_queries and length <= group_size - before:
                lead, before, group_size = 0, 0, length
        num_groups, in_last = divided(length, group_size, before)
        trail = -in_last % group_size
        num_groups += in_last > 0
        groups = F.pad(queries, (0, 0, lead, trail)).unflatten(1, (num_groups, group_size))

        with network_autocast(self._dtype, rows.device):
            values = self._engine.retrieve(weights, groups, first_step).flatten(1, 2)
        values = values[:, values.shape[1] - trail - length : values.shape[1] - trail]
        return self._combined(values, normed[:, -length:])

    def _queries(self, rows: Float[Tensor, 'b t d']) -> tuple[Float[Tensor, 'b n d'], Float[Tensor, 'bh n e']]:
        """Rows normalised, and what the memory is asked for them, but for those at the front for the convolution."""
        normed = self.retrieve_norm(rows)
        queries = self._queries_of(self.to_queries(normed))
        return normed[:, self.conv_reach :], network_rows(queries, self._dtype)

    def _queries_of(self, projected: Float[Tensor, 'b n d']) -> Float[Tensor, 'bh n e']:
        return self.q_norm(projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)).flatten(0, 1)

    def _combined(self, values: Float[Tensor, 'bh n e'], normed: Float[Tensor, 'b n d']) -> Float[Tensor, 'b n d']:
        """The heads' answers as one."""
        values = in_module_precision(values, self._dtype)
        values = self.multihead_rmsnorm(values.unflatten(0, (-1, self.heads)))
        if self.retrieve_gate is not None:
            values = values * self.retrieve_gate(normed)
        return self.combine_heads(values.transpose(1, 2).flatten(2))


def _checked_chunk_sizes(chunk_size: Any) -> tuple[int, int]:
    """The sizes for retrieving and storing, from one for both or from a pair."""
    pair = [*chunk_size] if isinstance(chunk_size, (tuple, list)) else [chunk_size] * 2
    if len(pair) != 2:
        raise ValueError(f'chunk_size must be an integer or a pair (retrieve, store), got {described(chunk_size)}')
    retrieve, store = (check_integer('chunk_size', size, 1) for size in pair)
    return retrieve, store


def _optional(module: Module | None, x: Tensor) -> Tensor | None:
    return None if module is None else at_least_float32(module(x))


def _joined_masks(pending: PendingSegment, call: Call) -> Bool[Tensor, 'b n'] | None:
    """One mask for the pending tokens and the new ones; `None` if all are to be stored."""
    if pending.mask is None and call.mask is None:
        return None
    masks = []
    for mask, tokens in ((pending.mask, pending.tokens), (call.mask, call.store)):
        masks.append(tokens.new_ones(tokens.shape[-3:-1], dtype=torch.bool) if mask is None else mask)
    return torch.cat(masks, dim=-1)


def _last_rows(rows: Tensor | None, like: Float[Tensor, 'b n d'], count: int) -> Float[Tensor, 'b m d']:
    """The last `count` rows, preceded by rows of zeros where there are fewer."""
    rows = like[:, :0] if rows is None else rows
    missing = max(0, count - rows.shape[1])
    return F.pad(rows, (0, 0, missing, 0))[:, rows.shape[1] + missing - count :]
