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
