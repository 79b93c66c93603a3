"""The error of a second derivative: kernels compute first ones."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse_second_derivatives(name: str) -> NoReturn:
    raise RuntimeError(
        f'{name} is computed by a Triton kernel, which can be differentiated once: for derivatives of a gradient, '
        'compute it and what it is the gradient of within `with titans_pytorch.without_kernels():`'
    )


def differentiated_once(backward: Any) -> None:
    """Let a derivative of `backward`, a custom operation that computes a gradient, be that error."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        refuse_second_derivatives(backward._qualname.removesuffix('_backward'))

    backward.register_autograd(refuse)
