"""Whether a policy has understood what its actions do, on all windows of held-out episodes: R2 of
the actions that it reads off true films (idm), and how far its imagined film (world_model) follows
when every action is reversed, against another seed of the noise.

    PYTHONPATH=. python docs/own_robot/probe.py runs/fetch fetch.json [Euler steps of a film]
"""

import math
import sys

import torch

import data
from sample import Policy


@torch.no_grad()
def main() -> None:
    policy = Policy.load(sys.argv[1], "world_model", steps=10)
    robot = policy.statistics
    pyramid = data.open_pyramid(sys.argv[2], "3", policy.card.preset, robot=robot.embodiment)
    pyramid.see_as(robot)
    rows = []
    for number, source in enumerate(pyramid.opened):
        span = math.ceil(pyramid.span * source.reader.fps)
        for episode in range(source.trained, len(source.reader.lengths)):
            rows += [(number, episode, at) for at in range(source.reader.lengths[episode] - span)]
    batch = data.batch_of(pyramid, torch.tensor(rows), "real", [robot], policy.model.config)
    inputs = data.encode(batch, policy.backbones).to(policy.device)

    policy.steps = 1  # the mean, which is the best guess of an action
    read = policy.sample(inputs, "idm").actions
    policy.steps = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    error = (read - inputs.actions).square().mean(dim=(0, 1))
    spread = inputs.actions.var(dim=(0, 1), correction=0)
    print("idm R2 of each action:", " ".join(f"{x:.3f}" for x in 1 - error / spread))

    def last(actions: torch.Tensor, seed: int) -> torch.Tensor:
        """The last frames (B, H, W, 3) of the films that follow from actions."""
        inputs.actions = actions
        policy.generator.manual_seed(seed)
        film = policy.sample(inputs, "world_model").video
        return policy.backbones.decode_video(film)[:, -1].float()

    true = inputs.actions
    reversed_ = robot.actions.apply(-robot.actions.invert(true))
    base = last(true, 0)
    follows = (last(reversed_, 0) - base).abs().mean().item()
    noise = (last(true, 1) - base).abs().mean().item()
    print(f"reversed actions change the last frame by {follows:.2f} of 255, a seed by {noise:.2f}")
    print(f"{len(rows)} windows; {follows / noise:.1f} times")


if __name__ == "__main__":
    main()
