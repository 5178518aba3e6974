"""Published weights: where they are, under which licence, and how they get here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Published folders: repository, revision, gigabytes, licence.
HUB = {
    "wan": (
        "Wan-AI/Wan2.2-TI2V-5B",
        "921dbaf3f1674a56f47e83fb80a34bac8a8f203e",
        34.2,
        "Apache-2.0",
    ),
    "qwen3vl": (
        "Qwen/Qwen3-VL-2B-Instruct",
        "89644892e4d85e24eaac8bacfd4f463576704203",
        4.3,
        "Apache-2.0",
    ),
    "motus-stage1": ("motus-robotics/Motus_Wan2_2_5B_pretrain", "main", 10, "Apache-2.0"),
    "motus-stage2": ("motus-robotics/Motus", "main", 16, "Apache-2.0"),
    "motus-stage3": ("motus-robotics/Motus_robotwin2", "main", 16, "Apache-2.0"),
    "dcae": ("mit-han-lab/dc-ae-f128c512-in-1.0", "main", 4.5, "Apache-2.0"),
    # A release on GitHub, not on the hub.
    "dpflow": ("hmorimitsu/ptlflow", "weights1", 0.04, "academic and research use only"),
}
COMPLETE = ".complete"  # lies in a folder whose download has ended


def snapshot(repository: str, revision: str | None, files: list[str], **options: object) -> str:
    """The folder with files of a repository on the hub, downloaded by huggingface_hub."""
    with reaching(f"{repository} on huggingface.co"):
        from huggingface_hub import snapshot_download

        return snapshot_download(repository, revision=revision, allow_patterns=files, **options)


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """A download; what goes wrong, of whatever kind, is one ValueError with what to do."""
    try:
        yield
    except Exception as error:
        remedy = "check its name, your network and free space, or fetch it elsewhere"
        if isinstance(error, ImportError):
            remedy = "pip install 'motus[hub]'"
        why = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{what} cannot be fetched ({type(error).__name__}: {why}); {remedy}"
        ) from error


def fetched(path: str | Path) -> Path:
    """A path as it is. A key of HUB, or the repository in its row, where no such path exists: the
    folder weights/KEY, downloaded once."""
    name = next((name for name, row in HUB.items() if str(path) in (name, row[0])), None)
    if name is None or Path(path).exists():
        return Path(path)
    folder = Path("weights") / name
    if not (folder / COMPLETE).is_file():
        download(name, folder)
    return folder


def download(name: str, folder: str | Path) -> None:
    """Fetches a published folder; a broken download goes on where it stopped."""
    repository, revision, gigabytes, licence = HUB[name]
    print(
        f"{name}: {repository} at {revision[:12]}, about {gigabytes:g} GB, licence {licence} (read"
        f" its card), into {folder}"
    )
    if name == "dpflow":
        fetch(folder)
    else:
        snapshot(repository, revision, ["*"], local_dir=folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / COMPLETE).write_text(revision)


LICENCE_NOTICE = (
    "DPFlow weights (Morimitsu et al., CVPR 2025, github.com/hmorimitsu/ptlflow): released strictly"
    " for academic and research purposes, following the licences of the data sets they were trained"
    " on. The original code is Apache-2.0. For other uses choose another FlowEstimator, such as"
    " DISFlow."
)
RELEASES = "https://github.com/hmorimitsu/ptlflow/releases/download/weights1/"
# The one not tuned to a benchmark. The name ends in the first digits of the file's sha256.
THINGS = "dpflow-things-2012b5d6.ckpt"


def fetch(folder: str | Path) -> Path:
    """Downloads DPFlow's weights into `folder`, unless they are there, and returns their path.
    Prints their licence on stderr."""
    print(LICENCE_NOTICE, file=sys.stderr)
    path = Path(folder) / THINGS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digits = path.stem.rpartition("-")[2]
        with reaching(RELEASES + THINGS):
            torch.hub.download_url_to_file(RELEASES + THINGS, str(path), hash_prefix=digits)
    return path
