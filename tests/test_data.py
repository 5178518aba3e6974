"""Episodes to batches: two rates in one window, masks past the end, an order that depends on seed and step alone."""

import numpy as np
import pytest
import torch

import data
from motus import Inputs, preset

CONFIG = preset("toy")                        # 4 frames, 3 actions per frame: 12 actions


@pytest.fixture(scope="module")
def episodes():
    return data.toy_episodes((6,), 3, seed=5)


def test_a_window_is_action_dense_and_video_sparse(episodes):
    """Frames at s, s+3, ..., s+12; actions s, s+1, ..., s+11; state at s."""
    episode, start = episodes[1], 4
    stats = data.statistics(episodes)
    batch = data.collect(episodes, [(1, start)], CONFIG, stats)
    assert torch.equal(batch.frames[0], torch.from_numpy(episode.frames[[4, 7, 10, 13, 16]]))
    actions = stats.actions.invert(batch.actions[0])
    torch.testing.assert_close(actions, torch.from_numpy(episode.actions[4:16]))
    torch.testing.assert_close(stats.state.invert(batch.state[0]), torch.from_numpy(episode.states[4]))
    assert batch.action_mask.all() and batch.video_mask.all()


def test_what_lies_past_the_end_is_repeated_and_masked(episodes):
    """Seven actions before the end: five are padding, and so is the latent frame that needs the missing video frames."""
    episode = episodes[0]
    start = len(episode.actions) - 7
    batch = data.collect(episodes, [(0, start)], CONFIG, data.statistics(episodes))
    assert batch.action_mask[0, :, 0].tolist() == [True] * 7 + [False] * 5
    assert batch.video_mask[0].tolist() == [True, False]
    assert torch.equal(batch.frames[0, -1], torch.from_numpy(episode.frames[-1]))


def test_latent_actions_are_taken_at_the_video_rate(episodes):
    """Row i of a latent file spans steps i to i + 3, so a chunk of four takes every third row."""
    config = preset("toy", finetune=False, ratio=1, action_dim=14)
    rows = [np.arange(len(e.actions), dtype=np.float32)[:, None].repeat(14, 1) for e in episodes]
    batch = data.collect(episodes, [(2, 5)], config, latents=rows)
    assert batch.actions[0, :, 0].tolist() == [5, 8, 11, 14] and batch.state is None


def test_video_without_actions_has_none(episodes):
    """Stage 1 sees pixels and words."""
    batch = data.collect(data.toy_episodes((2,), 2, seed=0), [(0, 0), (1, 0)], CONFIG)
    assert batch.actions is None and batch.state is None and batch.level.tolist() == [2, 2]


def test_normalisation_round_trips_and_survives_json(episodes):
    """A checkpoint always knows its robot's units."""
    stats = data.statistics(episodes)
    x = torch.randn(5, 3)
    torch.testing.assert_close(stats.actions.invert(stats.actions.apply(x)), x)
    assert data.Statistics.from_json(stats.as_json()) == stats
    rows = stats.actions.apply(torch.from_numpy(np.concatenate([e.actions for e in episodes])))
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_a_dimension_that_never_moves_keeps_its_scale():
    """No division by zero."""
    assert data.Normaliser.fit(np.array([[1.0, 2.0], [1.0, 4.0]])).std == (1.0, 1.0)


def test_statistics_refuse_bad_input(episodes):
    """NaN, two robots at once, unknown fields: one clear error each."""
    with pytest.raises(ValueError, match="1 are not finite"):
        data.Normaliser.fit(np.array([[np.nan, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="belong to one robot"):
        data.statistics([*episodes, *data.toy_episodes((5,), 2, seed=0)])
    with pytest.raises(ValueError, match="unknown fields.*colour"):
        data.Statistics.from_json({"embodiment": "x", "rate": 3, "colour": 1})


def test_batches_are_a_function_of_seed_and_step_and_mix_levels_in_equal_shares():
    """The same rows whatever was drawn before; each level gets its share."""
    level = torch.tensor([2] * 50 + [3] * 5 + [5] * 500)
    pool = data.Pool(Inputs(torch.zeros(555, 1, 1, 1, 1), torch.zeros(555, 1, 1), torch.ones(555)), level)
    rows = pool.rows(30, seed=1, step=7)
    assert torch.equal(rows, pool.rows(30, 1, 7))
    assert not torch.equal(rows, pool.rows(30, 1, 8)) and not torch.equal(rows, pool.rows(30, 2, 7))
    assert {int(v): int((level[rows] == v).sum()) for v in (2, 3, 5)} == {2: 10, 3: 10, 5: 10}


def test_grounding_targets_are_where_the_named_disc_is():
    """The target's pixel has the colour that the sentence names."""
    web = data.ToyWeb(2, seed=0)
    pictures, texts, targets = web.grounded(3, size=64)
    ink = {"red": (0, 1), "green": (1, 0), "blue": (2, 0), "yellow": (0, 2)}                  # strongest channel, a weaker one
    hits = 0
    for picture, text, target in zip(pictures, texts, targets):
        strong, weak = ink[text.split()[2]]
        x, y = (target[:2] * picture.shape[0]).long().clamp(0, picture.shape[0] - 1)
        hits += int(picture[y, x, strong]) > int(picture[y, x, weak])
    assert hits > 0.8 * len(texts)                                                           # a robot may cover the disc
