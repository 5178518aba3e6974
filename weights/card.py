"""The card of a checkpoint: what it knows about itself, `config.json` beside its weights."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from weights.files import check_keys, read_json


@dataclass(frozen=True)
class Card:
    """The facts that a checkpoint stores: `config.json` beside its weights."""

    motus: dict  # fields of `motus.MotusConfig`, as json has them
    stage: str  # "1", "2" or "3"
    preset: str = "toy"  # row of PRESETS and BACKBONES it belongs to
    statistics: dict | None = (
        None  # normalisation, rates and embodiment (`data.Statistics`), stage 3
    )
    latent_interval: int | None = None  # action steps that one latent action spans, stage 2
    step: int = 0
    # digests of the frozen networks it was trained with (`Backbones.fingerprint`)
    backbones: dict | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> "Card":
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {path.name}; a checkpoint is a folder like"
                " runs/NAME/step_001000"
            )
        stored = read_json(path)
        check_keys(stored, cls, path)
        network = stored.get("motus")
        sizes = dict(network) if isinstance(network, dict) else {}
        video = sizes.pop("video", None)
        sound = isinstance(video, dict) and all(isinstance(n, (int, float)) for n in sizes.values())
        if not sound or stored.get("stage") not in ("1", "2", "3"):
            raise ValueError(
                f"{path} is no checkpoint's: motus is {network!r:.100}, stage is"
                f" {stored.get('stage')!r:.50}, expected sizes of a network and 1, 2 or 3; name a"
                " folder that train.py wrote, or published weights"
            )
        return cls(**stored)


def steps_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, from the oldest on."""
    steps = {path.name.removeprefix("step_"): path for path in run.glob("step_*")}
    return [steps[number] for number in sorted(filter(str.isdecimal, steps), key=int)]


def newest_step(path: str | Path) -> Path:
    """A run folder -> its newest complete checkpoint; a checkpoint folder -> itself."""
    path = Path(path)
    if path.name.startswith("step_") or (path / "config.json").is_file():
        return path
    steps = steps_of(path)
    if not steps:
        raise ValueError(
            f"{path} holds no checkpoint (step_NNNNNN); train one first or name another folder"
        )
    return steps[-1]


def results_of(path: str | None, name: str) -> Path:
    """Where the results of a run or checkpoint lie if nothing else is said; of weights that are
    none, or that have yet to be fetched, in runs/."""
    return (newest_step(path) if path and Path(path).is_dir() else Path("runs")) / name
