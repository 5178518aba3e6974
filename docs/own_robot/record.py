"""Records demonstrations of the scripted expert with the lerobot package (0.4.4), as a user's own
tool would: nothing of motus is in this file but the seeds, so that no scene is also tried in.

    PYTHONPATH=.:docs/own_robot python docs/own_robot/record.py data/fetch 105
    PYTHONPATH=.:docs/own_robot python docs/own_robot/record.py data/calm 21 calm     undisturbed
"""

import sys

import numpy as np

from worlds import RECORDED, episode_seeds


def main() -> None:
    import fetch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    out, count = sys.argv[1], int(sys.argv[2])
    calm = len(sys.argv) > 3
    names = ["x", "y", "z", "fingers"]
    picture = {"dtype": "video", "shape": (192, 192, 3), "names": ["height", "width", "channels"]}
    numbers = {"dtype": "float32", "shape": (4,), "names": names}
    features = {"observation.state": numbers, "action": numbers}
    features["observation.images.front"] = picture
    dataset = LeRobotDataset.create("me/fetch", 10, features, root=out, robot_type="fetch")
    world = fetch.make("pick-place")
    rng = np.random.default_rng(0)
    tried = solved = 0
    seeds = episode_seeds(int(calm), RECORDED, 2 * count)
    while solved < count:
        seen = world.reset(seeds[tried])
        after = 0  # rows since success
        # Every other hand is disturbed, by 1.5 cm, and what was meant is written.
        shaky = 0 if calm else 0.3 * (tried % 2)
        rows = []
        while len(rows) < world.max_steps and after < 7:
            action = world.expert()
            rows.append(
                {
                    "observation.images.front": seen["images"]["front"],
                    "observation.state": seen["state"],
                    "action": action.astype(np.float32),
                    "task": world.instruction,
                }
            )
            world.step(action + shaky * rng.normal(size=4) * [1, 1, 1, 0])
            seen = world.observe()
            after += world.success
        tried += 1
        solved += world.success
        for row in rows if world.success else ():
            dataset.add_frame(row)
        if world.success:
            dataset.save_episode()
    dataset.finalize()
    print(f"{solved} of {tried} tries solved and kept")


if __name__ == "__main__":
    main()
