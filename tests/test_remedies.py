"""Remedies that errors of the formats name, typed in as they are written: what was refused is taken
then."""

import ast
import json
import re
import shutil
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")
from lerobot_files import SINGLE, as_v21  # noqa: E402

from formats.cards import CardKeys, Pyramid, Source  # noqa: E402
from formats.lerobot import PANDAS, write_v3  # noqa: E402
from formats.recordings import Choice  # noqa: E402

ROOT = Path(__file__).parents[1]


def pictures(shade: int, count: int = 24) -> list[np.ndarray]:
    return [np.full((32, 48, 3), shade + 3 * i, np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Sound datasets: v3 and v21 of two cameras, slow at 5 fps, wide with more actions, still with
    an action that never moves."""
    folder = tmp_path_factory.mktemp("sets")
    for name, fps, width in (
        ("v3", 10, 2),
        ("v21", 10, 2),
        ("slow", 5, 2),
        ("wide", 10, 3),
        ("still", 10, 2),
    ):
        rng = np.random.default_rng(len(name) + width)
        episodes = []
        for e in range(3):
            rows = rng.normal(size=(24, width))
            rows[:, -1] = 0.5 if name == "still" else rows[:, -1]
            views = {"front": pictures(20 + e), "wrist": pictures(90 + e)}
            episodes.append((views, rows, rows, f"task {e}"))
        write_v3(folder / name, episodes, fps, SINGLE)
    as_v21(folder / "v21")
    for path in folder.glob("*/meta/info.json"):
        info = json.loads(path.read_text())
        path.write_text(json.dumps(info | {"robot_type": "so100"}))
    return folder


def info_of(root: Path, change) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def lines_of(root: Path, name: str, change) -> None:
    path = root / f"meta/{name}.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def place(root: Path, name: str, change) -> None:
    """Changes a column of meta/episodes."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = pa.array(change(table[name].to_pylist()), table[name].type)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


def cell(name: str, value):
    """The second episode's v2.1 table with another first value."""

    def change(root: Path) -> None:
        path = sorted(root.rglob("*.parquet"))[1]
        table = pq.read_table(path)
        values = pa.array([value, *table[name].to_pylist()[1:]], table[name].type)
        pq.write_table(table.set_column(table.column_names.index(name), name, values), path)

    return change


TO = "videos/observation.images.front/to_timestamp"
# What is broken -> kind of dataset, how, what the error says, the remedy done as it is written.
DATASETS = {
    "correct info.json (frames)": (
        "v3",
        lambda root: info_of(root, lambda i: i.update(total_frames=99)),
        r"total_frames: is 99, the episodes have (72); correct info.json",
        lambda root, had: info_of(root, lambda i: i.update(total_frames=int(had[0]))),
    ),
    "correct one of them (episodes)": (
        "v21",
        lambda root: info_of(root, lambda i: i.update(total_episodes=2)),
        r"has (3) rows, info.json says 2; correct one of them",
        lambda root, had: info_of(root, lambda i: i.update(total_episodes=int(had[0]))),
    ),
    "keep the files of one version": (
        "v3",
        lambda root: (root / "meta/tasks.jsonl").write_text("{}"),
        r"(meta/tasks.jsonl): belongs to another version than v3.0; keep the files of one version",
        lambda root, had: (root / had[0]).unlink(),
    ),
    "write it as the template": (
        "v3",
        lambda root: info_of(root, lambda i: i.update(data_path="{x}")),
        r"data_path: is '\{x\}'; write it as (\S+)",
        lambda root, had: info_of(root, lambda i: i.update(data_path=had[0])),
    ),
    "a whole number of a line": (
        "v21",
        lambda root: (root / "meta/tasks.jsonl").open("a").write("broken\n") and None,
        r"tasks.jsonl: cannot be read: .* in row (\d); fetch or write it again",
        lambda root, had: (root / "meta/tasks.jsonl").write_text(
            "".join((root / "meta/tasks.jsonl").read_text().splitlines(True)[: int(had[0])])
        ),
    ),
    "must be from_timestamp + length / fps": (
        "v3",
        lambda root: place(root, TO, lambda v: [x + 1 for x in v]),
        r"(to_timestamp): is .*; must be from_timestamp \+ length / fps",
        lambda root, _: place(root, TO, lambda v: [0 + 24 / 10] * len(v)),
    ),
    "must count the rows of all episodes before": (
        "v3",
        lambda root: place(root, "dataset_from_index", lambda v: [0, 25, 48]),
        r"dataset_from_index: is 25; (must count the rows of all episodes before)",
        lambda root, _: place(root, "dataset_from_index", lambda v: [0, 24, 48]),
    ),
    "give each episode a task": (
        "v21",
        lambda root: lines_of(root, "episodes", lambda rows: [r | {"tasks": []} for r in rows]),
        r"tasks: is 0; (give each episode at least one)",
        lambda root, _: lines_of(
            root,
            "episodes",
            lambda rows: [r | {"tasks": [f"task {i}"]} for i, r in enumerate(rows)],
        ),
    ),
    "add the task": (
        "v21",
        cell("task_index", 7),
        r"task_index: is (7), which meta/tasks lacks; add the task, or choose from \[0, 1, 2\]",
        lambda root, had: lines_of(
            root, "tasks", lambda rows: [*rows, {"task_index": int(had[0]), "task": "seven"}]
        ),
    ),
    "choose from the tasks": (
        "v21",
        cell("task_index", 7),
        r"task_index: is 7, which meta/tasks lacks; .* choose from \[0, (1), 2\]",
        lambda root, had: cell("task_index", int(had[0]))(root),
    ),
    "rows must follow": (
        "v21",
        cell("frame_index", 3),
        r"frame_index: row 0 is 3, expected (0); rows must follow",
        lambda root, had: cell("frame_index", int(had[0]))(root),
    ),
    "repair what is not finite": (
        "v21",
        cell("action", [float("nan"), 1.0]),
        r"action: row 0, dimension 0 is nan; (repair) or drop it",
        lambda root, _: cell("action", [0.25, 1.0])(root),
    ),
    "a shape from info.json": (
        "v21",
        lambda root: info_of(root, lambda i: i["features"]["action"].update(shape=None)),
        r"action: feature is .*; expected a (shape), sizes from 1 to 16384: correct info.json",
        lambda root, had: info_of(root, lambda i: i["features"]["action"].update({had[0]: [2]})),
    ),
}


def faults_of(root: Path) -> str:
    """Every fault that opening or `check` names."""
    try:
        return "\n".join(Pyramid(root, (6,), 4, (32, 48)).check())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_is_sound_once_the_remedy_was_typed_in(sets, tmp_path, name):
    kind, spoil, said, cure = DATASETS[name]
    root = tmp_path / "set"
    shutil.copytree(sets / kind, root)
    spoil(root)
    found = re.search(said, faults_of(root))
    assert found, faults_of(root)
    cure(root, found.groups())
    assert faults_of(root) == ""


# A card that is refused -> what the error says, and the card with the remedy typed in.
CARDS = {
    "constant": (
        {"sources": [{"path": "still"}]},
        r'action: dimension 1 is 0.5 in every row; .* allow it by ("mapping": \{.*?\}) in the card',
        lambda card, had: card["sources"][0].update(json.loads("{" + had[0] + "}")),
    ),
    "one action_hz": (
        {"sources": [{"path": "v3"}, {"path": "slow"}]},
        r'run at \[5, (10)\] fps; choose one ("action_hz")',
        lambda card, had: card.update({json.loads(had[1]): int(had[0])}),
    ),
    "a whole multiple": (
        {"video_hz": 4, "sources": [{"path": "v3"}]},
        r"action_hz 10 is 2.5 times (video_hz) 4; expected a whole multiple",
        lambda card, had: card.update({had[0]: 5}),
    ),
    "two names": (
        {"sources": [{"path": "v3"}, {"path": "wide"}]},
        r"have .* numbers of state and action; give them two names by (embodiment)",
        lambda card, had: card["sources"][1].update({had[0]: "long arm"}),
    ),
    "held_out leaves one": (
        {"sources": [{"path": "v3", "held_out": 3}]},
        r"(held_out) is 3 of 3 episodes; leave at least one to train on",
        lambda card, had: card["sources"][0].update({had[0]: 2}),
    ),
    "a larger weight": (
        {"sources": [{"path": "v3"}, {"path": "v3"}]},
        r"is there twice; give it a larger (weight) instead",
        lambda card, had: card.update(sources=[{"path": "v3", had[0]: 2}]),
    ),
    "choose from the cameras": (
        {"sources": [{"path": "v3", "mapping": {"cameras": ["rear"]}}]},
        r"rear: is chosen as a camera and is none here; choose from \['(\S+)',",
        lambda card, had: card["sources"][0]["mapping"].update(cameras=[had[0]]),
    ),
    "choose from the columns": (
        {"sources": [{"path": "v3", "mapping": {"action": "motors"}}]},
        r"motors: is chosen as action and is none here; choose from .*'(action)'",
        lambda card, had: card["sources"][0]["mapping"].update(action=had[0]),
    ),
    "name three": (
        {"sources": [{"path": "v3", "mapping": {"t_layout": True}}]},
        r"(cameras): head, left, right could be .*; name three of \['(\S+)', '(\S+)'\]",
        lambda card, had: card["sources"][0]["mapping"].update(
            {had[0]: list(had[1:])} | {"t_layout": False}
        ),
    ),
    "normalised by one": (
        {"sources": [{"path": "v3"}, {"path": "v21", "normalise": "none"}]},
        r"sources of so100 are normalised by .*'(mean_std)'.*; choose one",
        lambda card, had: card["sources"][1].update(normalise=had[0]),
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_taken_once_the_remedy_was_typed_in(sets, tmp_path, name):
    card, said, cure = CARDS[name]
    card = json.loads(json.dumps(card))
    for path in sets.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def faults() -> str:
        (tmp_path / "card.json").write_text(json.dumps(card))
        try:
            pyramid = Pyramid(tmp_path / "card.json", (6,), 4, (32, 48))
            pyramid.robots(True)
            return "\n".join(pyramid.check())
        except ValueError as error:
            return str(error)

    found = re.search(said, faults())
    assert found, faults()
    cure(card, found.groups())
    assert faults() == ""


def test_held_out_can_be_set_to_more(sets, tmp_path):
    """Where a card holds none out there is none to show; one is, once the card says so."""
    (tmp_path / "v3").symlink_to(sets / "v3")
    card = {"sources": [{"path": "v3", "held_out": 0}]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match='set "held_out" of a source to more'):
        Pyramid(tmp_path / "card.json", (6,), 4, (32, 48)).held_out(2, 0)
    card["sources"][0]["held_out"] = 1
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert len(Pyramid(tmp_path / "card.json", (6,), 4, (32, 48)).held_out(2, 0)) == 1


def test_a_set_without_video_says_what_a_window_needs(tmp_path):
    """`check` and training, in one line each, not in an index out of range."""
    rows = np.random.default_rng(0).normal(size=(24, 2))
    write_v3(tmp_path / "set", [({}, rows, rows, "go"), ({}, rows + 1, rows + 1, "go")], 10)
    pyramid = Pyramid(tmp_path / "set", (6,), 4, (32, 48))
    (fault,) = pyramid.check()
    assert "cameras: there are none; a window needs a video" in fault
    with pytest.raises(ValueError, match="cameras: there are none"):
        pyramid.window((0, 0, 0), "real")


def messages() -> list[str]:
    """Texts in the code of the formats; places where values go are {}."""
    found = []
    for path in sorted((ROOT / "formats").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(p if isinstance(p, str) else "{}" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_settings_extras_and_options_that_messages_name_exist():
    """mapping.X is a field of a mapping, "x" of a card, motus[x] an extra, --x an option."""
    stored = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    choices = {f.name for f in fields(Choice)}
    keys = (
        {f.name for f in fields(Source)}
        | {f.name for f in fields(CardKeys)}
        | {"level", "path"}
        | choices
    )
    named = {"mapping": set(), "card": set(), "extra": set()}
    for text in messages():
        if text == PANDAS:
            continue
        named["mapping"] |= set(re.findall(r"mapping\.(\w+)", text))
        named["card"] |= set(re.findall(r'"([a-z_]+)"(?=: | of a source| in the card)', text))
        named["extra"] |= set(re.findall(r"motus\[(\w+)\]", text))
    assert named["mapping"] <= choices and "instruction" in named["mapping"]
    assert named["card"] <= keys and {"constant", "mapping", "held_out"} <= named["card"]
    assert named["extra"] <= set(stored["optional-dependencies"]) and "data" in named["extra"]
