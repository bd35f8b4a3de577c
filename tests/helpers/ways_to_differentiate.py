"""Every way in which PyTorch can be asked for forward mode and for second derivatives of f at x."""

import torch
from torch.autograd import forward_ad


def _gradient(f, x):
    return torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)[0]


def _of_grad_out_only(f, x):
    """Differentiates the gradient by grad_out only, in which it is linear: a double backward
    without a second derivative by x."""
    grad_out = torch.ones_like(f(x), requires_grad=True)
    (gradient,) = torch.autograd.grad(f(x), x, grad_out, create_graph=True)
    return torch.autograd.grad(gradient.sum(), grad_out)[0]


def _dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x.detach(), x.cos()))).tangent


def _backward_of_dual(f, x):
    """Forward over reverse, without create_graph."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach().requires_grad_(), x.detach().cos())
        (gradient,) = torch.autograd.grad(f(dual).sin().sum(), dual)
        return forward_ad.unpack_dual(gradient).tangent


def _gradient_of_tangent(f, x):
    """Reverse over forward."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.detach().cos()))).tangent
    return torch.autograd.grad(tangent.sin().sum(), x)[0]


def _scalar(f):
    return lambda x: f(x).sin().sum()


def _along(f, x):
    """The derivative of f along cos(x)."""
    return torch.func.jvp(f, (x,), (x.detach().cos(),))[1]


functional = torch.autograd.functional

WAYS = {
    "create_graph": lambda f, x: torch.autograd.grad(_gradient(f, x).square().sum(), x)[0],
    "only grad_out": _of_grad_out_only,
    "dual numbers": _dual,
    "backward of dual numbers": _backward_of_dual,
    "gradient of a tangent": _gradient_of_tangent,
    "jvp": lambda f, x: _along(f, x.detach()),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x.detach()),
    "linearize": lambda f, x: torch.func.linearize(f, x.detach())[1](torch.ones_like(x)),
    "hessian": lambda f, x: torch.func.hessian(_scalar(f))(x.detach()),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(_scalar(f)))(x.detach()),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(_scalar(f)))(x.detach()),
    "jvp of grad": lambda f, x: _along(torch.func.grad(_scalar(f)), x.detach()),
    "grad of jvp": lambda f, x: torch.func.grad(lambda x: _along(f, x).sin().sum())(x.detach()),
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(_scalar(f))(x).square().sum()
    )(x.detach()),
    "functional.jvp": lambda f, x: functional.jvp(f, x, torch.ones_like(x))[1],
    "functional.vhp": lambda f, x: functional.vhp(_scalar(f), x, torch.ones_like(x))[1],
    "functional.hessian": lambda f, x: functional.hessian(_scalar(f), x),
    "functional.hessian, forward mode": lambda f, x: functional.hessian(
        _scalar(f), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}


def third(f, x):
    return torch.func.grad(
        lambda x: (
            torch.func.grad(lambda x: torch.func.grad(_scalar(f))(x).square().sum())(x)
            .square()
            .sum()
        )
    )(x)


ENDS = {
    "third derivative": third,
    "functional.hvp": lambda f, x: functional.hvp(_scalar(f), x, torch.ones_like(x)),
    "jacfwd of jacfwd": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(_scalar(f)))(x),
    "jvp of a second derivative": lambda f, x: _along(
        torch.func.grad(lambda x: torch.func.grad(_scalar(f))(x).square().sum()), x
    ),
}
