"""Optical flow as a field of vectors: at another size, in mirrors, as other bodies would make it.

Flow is (N, H, W, 2), x to the right and y downwards, in pixels of its own size. Labels (N, A) are
what a robot did, as far as mask (N, A) says that this is known.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resize_flow(flow: Tensor, side: int) -> Tensor:
    """Flow (N, H, W, 2) -> (N, side, side, 2), in pixels of the new size. Resize flow, never its
    colours: those do not mix."""
    if flow.ndim != 4 or flow.shape[-1] != 2:
        raise ValueError(f"flow has shape {tuple(flow.shape)}; expected (N, H, W, 2), in pixels")
    if bad := (~flow.isfinite()).sum().item():
        raise ValueError(
            f"flow holds {bad} values that are not finite; check the flow estimator and its input"
        )
    flow = flow.float()
    height, width = flow.shape[1:3]
    if height == width == side:
        return flow
    scale = flow.new_tensor([side / width, side / height])
    planes = rearrange(flow, "b h w c -> b c h w")
    resized = F.interpolate(planes, (side, side), mode="bilinear", antialias=True)
    return rearrange(resized, "b c h w -> b h w c") * scale


def mirrored(flow: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flow (N, H, W, 2) and labels (N, A), of which the first two are motion in x and y, as mirrors
    on two sides show them."""
    labels = labels.clone()
    for axis in range(2):
        if torch.rand((), generator=generator) < 0.5:
            flow = flow.flip(2 - axis)  # x runs along axis 2, y along axis 1
            flow[..., axis] *= -1
            labels[:, axis : axis + 1] *= -1
    return flow, labels


def other_bodies(flow: Tensor, generator: torch.Generator) -> Tensor:
    """The same motions as made by other bodies elsewhere: flow (N, H, W, 2) shifted by up to a
    fifth of the picture, and what moves thickened by 0 to 3 px."""
    height, width = flow.shape[1:3]
    farthest = 0.2 * torch.tensor([height, width])
    made = []
    for one in flow:
        way = 2 * torch.rand(2, generator=generator) - 1
        down, right = (way * farthest).round().int().tolist()
        reach = torch.randint(4, (), generator=generator).item()
        one = F.pad(one, (0, 0, right, -right, down, -down))
        # Each still pixel follows the fastest within reach.
        speed = one.norm(dim=-1)
        _, fastest = F.max_pool2d(
            speed[None],
            2 * reach + 1,
            stride=1,
            padding=reach,
            return_indices=True,
        )
        followed = one.flatten(0, 1)[fastest[0]]
        made.append(torch.where(speed[..., None] < 0.1, followed, one))
    return torch.stack(made)


def rarest_motions(labels: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the rows that show the known motion that is seldom there: a gripper opens seldom
    and moves few pixels, so training draws such rows more often."""
    moves = mask & (labels.abs() > 0.1)
    often = moves.float().mean(dim=0)
    often[often == 0] = 1.0  # never known, or never moving
    return moves[:, often.argmin()].nonzero()[:, 0]


def augmented(
    flow: Tensor,
    labels: Tensor,
    mask: Tensor,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flow, labels and mask with the labelled rows twice again, mirrored and as other
    bodies would make them, twice as often if the rarest motion is in them. The given rows come
    first. Aligned with one robot's flow alone, a latent action takes a larger body for a faster
    one."""
    generator = torch.Generator().manual_seed(seed)
    labelled = mask.any(dim=1).nonzero()[:, 0]
    again = torch.cat([labelled, rarest_motions(labels, mask)]).repeat(2)
    flows = [flow]
    made = [labels]
    for rows in again.split(64):
        motion, label = mirrored(flow[rows], labels[rows], generator)
        flows.append(other_bodies(motion, generator))
        made.append(label)
    return torch.cat(flows), torch.cat(made), torch.cat([mask, mask[again]])
