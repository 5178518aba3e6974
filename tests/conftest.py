"""Where there is no GPU, Triton interprets its kernels. It decides that when it is imported, by
whatever test comes first: hence here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
