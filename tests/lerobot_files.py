"""LeRobot datasets of a kind that is read and not written: v2.1."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from formats.lerobot import PATHS
from formats.recordings import Storage

SINGLE = Storage(together=1)  # each episode gets its own files, as in v2.1


def as_v21(root: Path) -> None:
    """Turns a v3.0 dataset that was written with SINGLE into one of v2.1."""
    meta = root / "meta"
    info = json.loads((meta / "info.json").read_text())
    rows = pq.read_table(meta / "episodes/chunk-000/file-000.parquet").to_pylist()
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    for e in range(len(rows)):
        new = {"episode_chunk": 0, "episode_index": e}
        old = {"chunk_index": 0, "file_index": e}
        for field, key in [("data_path", ""), *(("video_path", key) for key in videos)]:
            target = root / PATHS["v2.1"][field].format(**new, video_key=key)
            target.parent.mkdir(parents=True, exist_ok=True)
            (root / PATHS["v3.0"][field].format(**old, video_key=key)).rename(target)
    for key in videos:
        shutil.rmtree(root / "videos" / key)
    tasks = pq.read_table(meta / "tasks.parquet").to_pylist()
    rows = [{key: row[key] for key in ("episode_index", "tasks", "length")} for row in rows]
    for name, lines in {"tasks": tasks, "episodes": rows}.items():
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(meta / "episodes")
    (meta / "tasks.parquet").unlink()
    info |= PATHS["v2.1"] | {"codebase_version": "v2.1", "video_path": info["video_path"]}
    if videos:
        info["video_path"] = PATHS["v2.1"]["video_path"]
    (meta / "info.json").write_text(json.dumps(info))
