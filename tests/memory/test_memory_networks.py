"""Memory networks of a user: dense if the dual engine cannot serve them; frozen parts stay frozen."""

from __future__ import annotations

import types

import pytest
import torch
from compare import assert_same, gradients, randomised
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from titans_pytorch import MemoryMLP, MemorySwiGluMLP, NeuralMemory, reference_state_dict
from titans_pytorch.memory.backends import DenseBackend, DualBackend
from titans_pytorch.memory_models import LayerNorm, ResidualNorm

DIM = 8


class Network(nn.Module):
    """Two matrices and a vector, which subclasses use in one way or another."""

    rowwise = True

    def __init__(self, hidden: int = 6):
        super().__init__()
        self.first = nn.Parameter(torch.randn(DIM, hidden) * 0.4)
        self.last = nn.Parameter(torch.randn(hidden, DIM) * 0.4)
        self.scale = nn.Parameter(torch.ones(DIM))

    def hidden(self, x: Tensor) -> Tensor:
        return x.tanh()

    def forward(self, x: Tensor, linear=torch.matmul) -> Tensor:
        return linear(self.hidden(linear(x, self.first)), self.last) * self.scale.unsqueeze(-2)


class Plain(Network):
    pass


class InPlace(Network):
    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def hidden(self, x):
        return self.activation(x)


class InPlaceInTraining(Network):
    def hidden(self, x):
        return x.relu_() if self.training else x.relu()


class Transposed(Network):
    def forward(self, x, linear=torch.matmul):
        return linear(linear(x, self.last.mT).tanh(), self.first.mT) * self.scale.unsqueeze(-2)


class Product(Network):
    def forward(self, x, linear=torch.matmul):
        return linear(x, self.first @ self.last) * self.scale.unsqueeze(-2)


class Tied(Network):
    def __init__(self):
        super().__init__(DIM)
        self.last = self.first


class UnusedVector(Network):
    def forward(self, x, linear=torch.matmul):
        return linear(linear(x, self.first).tanh(), self.last)


class DeadBranch(Network):
    def forward(self, x, linear=torch.matmul):
        return linear(x.tanh() @ self.first.detach(), self.last) * self.scale.unsqueeze(-2) + 0 * linear(
            linear(x, self.first), self.last.detach()
        ).sum(dim=-1, keepdim=True)


class Detached(Network):
    def forward(self, x, linear=torch.matmul):
        return linear(linear(x, self.first).detach().tanh(), self.last) * self.scale.unsqueeze(-2)


class Recurrent(nn.Module):
    """A cell that sees the tokens of a chunk one after the other."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(DIM, DIM, batch_first=True)

    def forward(self, x):
        rows = x.reshape(-1, *x.shape[-2:])
        return self.cell(rows)[0].reshape(x.shape)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x):
        rows = x.reshape(-1, *x.shape[-2:])
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(rows, rows, rows, attn_mask=future)[0].reshape(x.shape)


class ListsItsModules(nn.Module):
    """One that also keeps its modules in a list of its own."""

    rowwise = True

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 6), nn.Linear(6, DIM)
        self.order = [self.a, nn.Tanh(), self.b]

    def forward(self, x):
        for part in self.order:
            x = part(x)
        return x


class KeepsMethods(nn.Module):
    """One that keeps a method and a parameter of its own."""

    rowwise = True

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(DIM, DIM) * 0.4)
        self.act = self._act
        self.cache = {'matrix': self.matrix}

    def _act(self, x):
        return (x @ self.matrix).tanh()

    def forward(self, x):
        return self.act(x) @ self.cache['matrix']


class Patched(Plain):
    """One whose instance has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(lambda self, x: Plain.forward(self, x).tanh(), self)


class Closed(Plain):
    """One that reaches itself through a closure."""

    def __init__(self):
        super().__init__()
        self.call = lambda x: x @ self.first @ self.last * self.scale

    def forward(self, x):
        return self.call(x)


class MixingNorm(ResidualNorm):
    """One of the package's own kind that mixes rows."""

    rowwise = False

    def __init__(self):
        super().__init__(DIM, MemoryMLP(DIM, 2))

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs).cumsum(dim=-2)


class FailsInProducts(Plain):
    """One that takes `linear` and fails with it."""

    def forward(self, x, linear=None):
        return super().forward(x) if linear is None else linear(x, self.last)


DENSE = [
    InPlace, InPlaceInTraining, Transposed, Product, Tied, UnusedVector, DeadBranch, Detached, FailsInProducts,
]  # fmt: skip
OWN = [SelfAttention, ListsItsModules, KeepsMethods, Patched]


def memory(network: nn.Module, **kwargs) -> NeuralMemory:
    torch.manual_seed(0)
    settings = {'chunk_size': 4, 'batch_size': 8, 'default_step_transform_max_lr': 0.02, **kwargs}
    return randomised(NeuralMemory(DIM, model=network, **settings).double(), 0.1)


def results(mem: NeuralMemory) -> tuple:
    torch.manual_seed(1)
    seq = torch.randn(2, 19, DIM, dtype=torch.float64)
    retrieved, state = mem(seq)
    with torch.no_grad():
        without_gradients = mem(seq)[0]
    pieces, at = [], None
    for piece in seq.split([5, 1, 7, 6], dim=1):
        out, at = mem(piece, state=at)
        pieces.append(out)
    assert_same(torch.cat(pieces, dim=1), retrieved)
    assert_same(without_gradients, retrieved.detach())
    return retrieved, state.states[0].to_dict(), gradients(mem, retrieved.square().sum())


@pytest.mark.parametrize('network', DENSE)
def test_networks_that_the_dual_engine_cannot_serve_are_dense(network: type):
    own = network()
    mem = memory(own)
    assert mem._backend_class is DenseBackend
    assert_same(results(mem), results(memory(own, engine='dense')))
    with pytest.raises(ValueError, match="engine='dual' cannot serve this model: .*; use engine='dense'"):
        memory(own, engine='dual')


def test_a_subclass_of_the_package_s_norm_is_tried_like_any_other_network():
    mem = memory(MixingNorm(), mem_model_norm_add_residual=False)
    assert mem.mixes_tokens and mem._backend_class is DenseBackend
    results(mem)


class DoubledNorm(LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def with_another_norm() -> nn.Module:
    network = ResidualNorm(DIM, MemoryMLP(DIM, 2))
    network.norm = DoubledNorm(DIM)
    return network


def with_a_norm_of_pytorch() -> nn.Module:
    network = MemorySwiGluMLP(DIM)
    network.norm = nn.LayerNorm(DIM)
    return network


def parametrized() -> nn.Module:
    network = MemoryMLP(DIM, 2)
    register_parametrization(network.weights, '0', Halved())
    return network


def tied() -> nn.Module:
    network = MemoryMLP(DIM, 2, expansion_factor=1.0)
    network.weights.register_parameter('1', network.weights[0])
    return network


def extended() -> nn.Module:
    network = MemoryMLP(DIM, 1)
    network.extra = nn.Parameter(torch.eye(DIM))
    return network


@pytest.mark.parametrize('network', [with_another_norm, with_a_norm_of_pytorch, parametrized, tied, extended])
def test_modified_networks_of_the_package_are_tried_like_any_other_network(network):
    own = network()
    mem, dense = (memory(own, mem_model_norm_add_residual=False, engine=engine) for engine in ('auto', 'dense'))
    assert_same(results(mem), results(dense))


def test_a_network_by_the_protocol_is_dual():
    network = Plain()
    mem = memory(network)
    assert mem._backend_class is DualBackend
    assert_same(results(mem), results(memory(network, engine='dense')))


def test_a_checkpoint_of_the_reference_names_tied_weights_twice():
    mem = memory(Tied())
    checkpoint = reference_state_dict(mem)
    assert {'memory_model.model.first', 'memory_model.model.last'} <= checkpoint.keys()
    mem.load_state_dict(checkpoint)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_networks_in_another_precision_are_built(dtype: torch.dtype):
    mem = NeuralMemory(DIM, model=Plain().to(dtype), chunk_size=4)
    assert mem._backend_class is DualBackend
    assert_same(results(randomised(mem.double(), 0.1))[0].isfinite().double(), torch.ones(2, 19, DIM))


@pytest.mark.parametrize('training', [False, True])
def test_trying_a_network_moves_no_random_state_and_no_mode(training: bool):
    class Noisy(Plain):
        def hidden(self, x):
            return nn.functional.dropout(x.tanh(), 0.5, self.training)

    network, plain = Noisy().train(training), Plain()
    torch.manual_seed(0)
    NeuralMemory(DIM, model=plain, engine='dense')
    expected = torch.get_rng_state()
    for engine in ('dual', 'dense', 'auto'):
        torch.manual_seed(0)
        NeuralMemory(DIM, model=network, engine=engine)
        assert torch.equal(torch.get_rng_state(), expected)
        assert network.training == training


@pytest.mark.parametrize('network', OWN)
def test_networks_of_one_s_own(network: type):
    network = network()
    mem = memory(network, chunk_size=3, batch_size=6)
    retrieved, _, of_all = results(mem)
    assert {f'memory_model_parameters.{k}' for k in range(len(mem.memory_model_parameters))} <= of_all.keys()

    # a memory with step size zero and no decay is the network itself
    without_steps = {'adaptive_step_transform': torch.zeros_like, 'default_step_transform_max_lr': 1.0}
    still = memory(network, **without_steps, mem_model_norm_add_residual=False)
    with torch.no_grad():
        still.to_decay_factor[0].weight.zero_()
        still.to_decay_factor[0].bias.fill_(-60.0)
    seq = torch.randn(1, 3, DIM, dtype=torch.float64)
    # before the first chunk ends, a group of queries begins with a row of zeros
    queries = still.to_queries(still.retrieve_norm(seq))
    padded = torch.cat((torch.zeros_like(queries[:, :1]), queries), dim=1) if still.mixes_tokens else queries
    assert_same(still(seq)[0], still.memory_model(padded)[:, -3:])


@pytest.mark.parametrize('shared', [False, True])
def test_a_scalar_parameter(shared: bool):
    class Scaled(Network):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, x, linear=torch.matmul):
            return linear(linear(x, self.first).tanh(), self.last) * self.scale

    network, kwargs = Scaled(), {'heads': 2, 'dim_head': DIM, 'per_head_learned_parameters': not shared}
    ours, dense = (memory(network, engine=engine, **kwargs) for engine in ('auto', 'dense'))
    assert ours.memory_model_parameters[-1].shape == (() if shared else (2,))
    assert ours.memory_model.model.scale.shape == ()
    assert_same(results(ours), results(dense))
    other = memory(Scaled(), **kwargs)
    other.load_state_dict(reference_state_dict(ours))
    assert_same(results(other), results(ours))


@pytest.mark.parametrize('engine', ['auto', 'dense'])
def test_networks_that_cannot_be_differentiated_by_chunks_are_refused(engine: str):
    with pytest.raises(ValueError, match='model must run under torch.func.vmap and torch.func.grad'):
        NeuralMemory(DIM, model=Recurrent(), engine=engine)


def test_networks_that_reach_themselves_through_a_closure_are_refused():
    with pytest.raises(ValueError, match='with weights that it accesses through `self`'):
        NeuralMemory(DIM, model=Closed())


class Centred(nn.Linear):
    """Not causal: each row of the output depends on the mean of all rows."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=-2, keepdim=True))


class Scaled(nn.Linear):
    """Not causal: each row of the output depends on how many rows there are."""

    def forward(self, x):
        return super().forward(x) * x.shape[-2] ** -0.5


class Rolled(nn.Linear):
    """Not causal, which only seven rows show."""

    def forward(self, x):
        y = super().forward(x)
        return y + x.roll(-6, -2) if x.shape[-2] > 6 else y


class Placed(nn.Linear):
    """A vector for each of the three places in a chunk."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.places = nn.Parameter(torch.randn(3, sizes[0]))

    def forward(self, x):
        return super().forward(x + self.places[: x.shape[-2]])


class CumulativeMean(nn.Linear):
    def forward(self, x):
        return super().forward(x.cumsum(dim=-2) / torch.arange(1, x.shape[-2] + 1, device=x.device).unsqueeze(-1))


@pytest.mark.parametrize('engine', ['auto', 'dense'])
def test_networks_that_use_rows_they_may_not_see_are_refused(engine: str):
    for network in (Centred, Scaled, Rolled):
        with pytest.raises(ValueError, match='model must be causal, but its output for a row depends on later rows'):
            NeuralMemory(DIM, chunk_size=9, model=network(DIM, DIM), engine=engine)
    mixing = CumulativeMean(DIM, DIM)
    NeuralMemory(DIM, chunk_size=4, model=mixing, engine=engine)
    mixing.rowwise = True
    with pytest.raises(ValueError, match='has rowwise=True, but its output for a row depends on earlier rows'):
        NeuralMemory(DIM, chunk_size=4, model=mixing, engine=engine)


class Shifted(CumulativeMean):
    """Earlier rows move all features of a row alike, which the norm around a network subtracts."""

    rowwise = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight) + x.cumsum(dim=-2)


class CentredWithDropout(Centred):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class LogOfScale(Plain):
    """One for positive weights, whose vector does not broadcast over rows."""

    def forward(self, x, linear=torch.matmul):
        return linear(linear(x, self.first).tanh(), self.last) * self.scale.log()


def test_what_a_trial_could_overlook():
    with pytest.raises(ValueError, match='has rowwise=True, but its output for a row depends on earlier rows'):
        NeuralMemory(DIM, chunk_size=4, model=Shifted(DIM, DIM))
    with pytest.raises(ValueError, match='model must be causal'):
        NeuralMemory(DIM, chunk_size=4, model=CentredWithDropout(DIM, DIM))
    assert NeuralMemory(DIM, chunk_size=2, model=LogOfScale())._backend_class is DenseBackend


def test_a_network_that_draws_random_numbers_in_training():
    class Noisy(nn.Linear):
        rowwise = True

        def forward(self, x):
            return super().forward(x + torch.randn_like(x) if self.training else x)

    mem = NeuralMemory(DIM, chunk_size=2, model=Noisy(DIM, DIM))
    seq = torch.randn(1, 6, DIM)
    assert not torch.equal(mem(seq)[0], mem(seq)[0])
    assert torch.equal(mem.eval()(seq)[0], mem(seq)[0])


def test_a_network_may_tell_the_places_in_a_chunk_apart():
    mem = memory(Placed(DIM, DIM), chunk_size=3, batch_size=6)
    seq = torch.randn(1, 11, DIM, dtype=torch.float64)
    state, outs = None, []
    for piece in seq.split([4, 1, 6], dim=1):
        out, state = mem(piece, state=state)
        outs.append(out)
    assert_same(torch.cat(outs, dim=1), mem(seq)[0], 1e-9)


def test_scripted_networks_are_refused():
    with pytest.warns(DeprecationWarning, match='torch.jit.script'):
        scripted = torch.jit.script(nn.Linear(DIM, DIM))
    with pytest.raises(TypeError, match='model must be a module of Python code, got a scripted one'):
        NeuralMemory(DIM, model=scripted)


def test_a_network_that_is_compiled_by_itself_is_refused():
    with pytest.raises(TypeError, match='model must not be compiled by itself'):
        NeuralMemory(8, chunk_size=4, model=torch.compile(nn.Linear(8, 8)))


@pytest.mark.parametrize('engine', ['auto', 'dense'])
def test_a_loss_may_draw_random_numbers(engine: str):
    def loss(prediction, target):
        return ((prediction - target) * torch.rand_like(prediction)).square().mean(dim=-1)

    mem = NeuralMemory(DIM, chunk_size=2, store_memory_loss_fn=loss, engine=engine)
    seq = torch.randn(2, 9, DIM)
    torch.manual_seed(0)
    first = mem(seq)[0]
    assert not torch.equal(mem(seq)[0], first)
    torch.manual_seed(0)
    assert torch.equal(mem(seq)[0], first)


def test_a_loss_over_all_rows_is_refused():
    with pytest.raises(ValueError, match='store_memory_loss_fn must return one loss a row'):
        NeuralMemory(DIM, store_memory_loss_fn=nn.MSELoss())


@pytest.mark.parametrize('engine', ['auto', 'dense'])
@pytest.mark.parametrize('which', ['first', 'last', 'scale'])
def test_frozen_parts_stay_frozen(which: str, engine: str):
    network = Plain()
    getattr(network, which).requires_grad_(False)
    value = getattr(network, which).detach().double().clone()
    mem = memory(network, engine=engine, heads=2, dim_head=DIM)
    names = mem.memory_model_parameter_names
    assert not any(which in name for name in names) and len(names) == 3  # with the gain of the norm around it
    assert_same(getattr(mem.memory_model.model, which), value, 0.0)

    retrieved, weights, _ = results(mem)
    assert not any(which in name for name in weights)
    for engine_of_other in ('auto', 'dense'):
        assert_same(results(memory(network, engine=engine_of_other, heads=2, dim_head=DIM))[0], retrieved)

    # saved and loaded, and moved, with the rest
    other = memory(plain_with_frozen(which), engine=engine, heads=2, dim_head=DIM)
    other.load_state_dict(mem.state_dict())
    assert_same(results(other)[0], retrieved, 0.0)
    assert other.float().memory_model.model(torch.zeros(2, DIM)).dtype == torch.float32


def plain_with_frozen(which: str) -> nn.Module:
    network = Plain()
    getattr(network, which).requires_grad_(False)
    return network


def test_frozen_parts_are_drawn_again():
    class Drawn(Plain):
        def reset_parameters(self):
            for parameter in (self.first, self.last, self.scale):
                nn.init.constant_(parameter, 0.25)

    network = Drawn()
    network.first.requires_grad_(False)
    with torch.device('meta'):
        mem = NeuralMemory(DIM, model=network.to('meta'))
    mem.to_empty(device='cpu').reset_parameters()
    assert all((w == 0.25).all() for w in (mem.memory_model.model.first, mem.memory_model.model.last))
    with pytest.raises(ValueError, match='frozen parts'):
        reference_state_dict(mem)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_frozen_parts_in_half_precision(dtype: torch.dtype):
    mem = memory(plain_with_frozen('first'))
    seq = torch.randn(1, 9, DIM, dtype=torch.float64)
    expected = mem(seq)[0]
    came = mem.to(dtype)(seq.to(dtype))[0]
    assert (came.double() - expected).norm() < 30 * torch.finfo(dtype).eps * expected.norm()


def test_a_network_that_is_all_frozen_is_no_memory():
    with pytest.raises(ValueError, match='model must have parameters that are not frozen'):
        NeuralMemory(DIM, model=Plain().requires_grad_(False))


@pytest.mark.parametrize('shared', [False, True])
def test_memory_model_is_an_empty_memory(shared: bool):
    mem = NeuralMemory(DIM, heads=2, dim_head=DIM, per_head_learned_parameters=not shared).double()
    randomised(mem, 0.2)
    rows = torch.randn(3, DIM, dtype=torch.float64)
    empty = mem.memory_model
    weights = {name: w[0] for name, w in mem.init_weights(1).items()}
    expected = torch.func.functional_call(NeuralMemory(DIM).memory_model, weights, (rows,))
    assert_same(empty(rows), expected)

    # its weights are those that train, or views of them, which no optimizer takes for its own
    assert all(p.device.type == 'cpu' for p in empty.parameters())
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        torch.optim.SGD(empty.parameters(), lr=0.1)
    empty.float()
    assert mem.memory_model_parameters[0].dtype == torch.float64
    empty = mem.memory_model
    with torch.no_grad():
        next(empty.parameters()).fill_(7.0)
    assert (mem.memory_model_parameters[0] == 7.0).all() if shared else (mem.memory_model_parameters[0][0] == 7.0).all()


@pytest.mark.parametrize('model', [None, MemoryMLP(DIM, 1)])
def test_memory_model_keeps_its_hooks(model: nn.Module | None):
    mem = NeuralMemory(DIM, model=model, chunk_size=4).double()
    calls = []
    mem.memory_model.register_forward_hook(lambda module, args, out: calls.append(1))
    with torch.no_grad():
        mem(torch.randn(1, 5, DIM, dtype=torch.float64))
    assert calls
