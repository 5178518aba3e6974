"""LeRobot datasets of kinds that are read and not written: v2.1, and pictures in parquet files."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from formats.lerobot import PATHS
from formats.recordings import Storage

SINGLE = Storage(data_mb=0, video_mb=0)  # each episode gets its own files, as in v2.1


def with_images(
    root: Path, size: tuple[int, int], cameras: dict[str, Callable[[int, int], np.ndarray]]
) -> None:
    """Adds cameras to a v3.0 dataset without any: name -> picture of (episode, row), as PNG."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        places = list(zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist()))
        for name, picture in cameras.items():
            cells = []
            for episode, row in places:
                file = io.BytesIO()
                Image.fromarray(picture(episode, row)).save(file, "PNG")
                cells.append({"bytes": file.getvalue(), "path": f"frame-{row:06d}.png"})
            table = table.append_column(name, pa.array(cells, kind))
        pq.write_table(table, path)
    info = json.loads((root / "meta/info.json").read_text())
    for name in cameras:
        axes = ["height", "width", "channels"]
        info["features"][name] = {"dtype": "image", "shape": [*size, 3], "names": axes}
    (root / "meta/info.json").write_text(json.dumps(info))


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
