"""A test sees no GPU, so that it finds on every machine what it finds on one without; `-m gpu` runs
those that are marked so on a GPU, `--device cuda` all of them. Where there is none, Triton
interprets its kernels. It decides that when it is imported, by whatever test comes first: hence
here."""

import os


def pytest_addoption(parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what a test sees")


def pytest_configure(config) -> None:
    if config.getoption("markexpr") != "gpu" and config.getoption("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

    remember_what_worlds_record()


def remember_what_worlds_record() -> None:
    """Many tests read the same few episodes of a world; they are rendered once in a process. That a
    recording is a function of its arguments is for tests/test_tabletop.py, which records anew."""
    from formats.rendered import Rendered

    render, made = Rendered._record, {}

    def record(self, count: int, split: str = "train", **more) -> list:
        key = self.world, self.level, self.seed, self.robot, split, *more.items()
        if len(made.get(key, ())) < count:  # the first of more are the same
            made[key] = render(self, count, split, **more)
        return made[key][:count]

    Rendered._record = record
