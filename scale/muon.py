"""Muon, an optimizer of matrices, which may be sharded over ranks."""

import math

import torch
from torch import Tensor

from scale.sharding import full_tensor
from weights.load import local_shard, shard_of


class Muon(torch.optim.Optimizer):
    """Momentum of matrices, made orthogonal before it is added, so that a step moves all directions
    alike (github.com/KellerJordan/Muon). The same as torch.optim.Muon but for two things: the
    iteration is in fp32, which takes a CPU less than half the time (12 against 30 ms of a step of
    115 ms at the smallest preset), and matrices that are sharded over ranks are gathered for it."""

    MOMENTUM = 0.95
    ITERATIONS = ((3.4445, -4.7750, 2.0315),) * 5  # of x, x x' x and x x' x x' x

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @classmethod
    def orthogonal(cls, x: Tensor) -> Tensor:
        """A matrix with its singular values moved to between about 0.7 and 1.2."""
        if x.shape[0] > x.shape[1]:
            return cls.orthogonal(x.mT).mT
        x = x / x.norm().clamp(min=1e-7)
        for a, b, c in cls.ITERATIONS:
            square = x @ x.mT
            x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                ahead = p.grad.lerp(momentum, self.MOMENTUM)
                move = self.orthogonal(full_tensor(ahead).float())
                rate = group["lr"] * math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                local_shard(p)[0].add_(shard_of(p, move), alpha=-rate)
