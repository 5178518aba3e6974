"""Sizes at which tests train: a card of a few rendered episodes, and settings."""

import json
from pathlib import Path

LINES = [
    {"level": 2, "embodiment": "hand"},
    {"level": 3, "embodiment": "gripper"},
    {"level": 4, "embodiment": "gripper", "mapping": {"instruction": ""}},
    {"level": 5, "embodiment": "arm"},
    {"level": 6, "embodiment": "gripper"},
]
SETTINGS = ["episodes=2", "windows=16", "batch=4", "log_every=1"]


def write_card(folder: Path) -> str:
    """A card of two episodes per level, and as many that are held out."""
    sources = [{"path": "world:toy", "held_out": 2} | line for line in LINES]
    card = folder / "card.json"
    card.write_text(json.dumps({"video_hz": 5, "action_hz": 15, "sources": sources}))
    return str(card)
