"""What exists for speed alone gives what the plain model gives: graphs and padding exactly, actions
first where nothing has moved yet, int8 within its rounding."""

from copy import deepcopy
from dataclasses import replace

import pytest
import test_modes
import torch
from test_modes import MODES, given, noises, outcome

from attention import Linear
from motus import Motus
from scale import fast
from scale.fast import ActionFirst, compile_sampler, padded, quantise, sample_action_first

model = test_modes.model  # the fixture

# -- static graphs --------------------------------------------------------------------------------


def test_padding_to_buckets_changes_nothing(model):
    """Text, which counts its padded rows, and understanding, where they are padded further."""
    inputs, noise = given(model), noises(model)
    longer = padded(inputs, 6)
    assert longer.context.shape[1] == 5 and longer.und.shape[1] == 12
    assert longer.und_mask.sum() == 14
    assert padded(replace(inputs, und=None), 6).und_mask is None
    expected = outcome(model, "joint", inputs, noise)
    for bucket in (6, 4, 8):
        found = outcome(model, "joint", padded(inputs, bucket), noise)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(expected, found))


@pytest.mark.slow
def test_one_graph_without_breaks_serves_all_five_modes(model):
    """The compiler's counters: one graph for all modes and lengths of a bucket, no break, no second
    compilation; the samples are those of eager, and the model itself stays as it is."""
    from torch._dynamo.utils import counters

    inputs, noise = given(model), noises(model)
    expected = {mode: outcome(model, mode, inputs, noise) for mode in MODES}
    first = sample_action_first(model, inputs, "vla", 3, **noise).actions
    torch._dynamo.reset()
    counters.clear()
    compiled = compile_sampler(model, backend="eager")
    longer = torch.cat([inputs.und, inputs.und], dim=1)
    longer = replace(inputs, und=longer, und_mask=torch.arange(14).expand(2, -1) < 7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mode in MODES:
            found = outcome(compiled, mode, inputs if mode == "joint" else longer, noise)
            assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected[mode])), mode
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"] and not counters["recompile_limit"]
    found = sample_action_first(compiled, inputs, "vla", 3, **noise).actions
    assert torch.allclose(found, first, atol=1e-5)
    assert "forward" not in vars(model) and "conditioning" not in vars(model)


# -- actions first --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, joint, expected",
    [("joint", 4, (4, 0)), ("vla", 1, (1, 3)), ("idm", 2, (2, 2)), ("joint", 0, (1, 4))],
)
def test_action_first_runs_the_whole_network_in_its_joint_steps_alone(
    model,
    monkeypatch,
    mode,
    joint,
    expected,
):
    """k joint steps, then the action expert alone; k = 0 takes one look of the video without the
    actions. An unfinished video is not returned, and with all steps joint nothing changes."""
    inputs, noise = given(model), noises(model)
    plain = model.sample(inputs, mode, 4, **noise)
    calls = {"whole": 0, "alone": 0}
    forward, act = Motus.forward, ActionFirst.act

    def whole(*args):
        calls["whole"] += 1
        return forward(*args)

    def alone(*args):
        calls["alone"] += 1
        return act(*args)

    monkeypatch.setattr(Motus, "forward", whole)
    monkeypatch.setattr(ActionFirst, "act", alone)
    found = sample_action_first(model, inputs, mode, 4, joint, **noise)
    assert (calls["whole"], calls["alone"]) == expected
    assert torch.equal(found.actions, plain.actions) == (joint == 4)
    assert (found.video is None) == (mode != "joint" or joint != 4)


@torch.no_grad()
def test_with_fresh_keys_and_values_the_action_expert_alone_finds_the_joint_velocity(model):
    """Held from the same evaluation, what the others showed is no approximation."""
    inputs, t = given(model), torch.tensor([0.7, 0.2])
    inputs.und_mask = torch.arange(7) < torch.tensor([[7], [4]])
    shared = model.conditioning(inputs, cache=True)
    first = ActionFirst(model, joint=1)
    time = model.embed_times(t, 1 - t)
    _, expected = first(inputs.latents, inputs.actions, time, shared)
    video, found = first(inputs.latents, inputs.actions, time, shared)
    assert video is None and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "mode, joint", [("joint", 5), ("joint", -1), ("vgm", 1), ("world_model", 0)]
)
def test_action_first_refuses_what_makes_no_sense(model, mode, joint):
    """More joint steps than steps, fewer than none, or a mode without actions to denoise."""
    with pytest.raises(ValueError, match=f"joint is {joint} in mode {mode} of 4 steps"):
        sample_action_first(model, given(model), mode, 4, joint)


# -- int8 weights ---------------------------------------------------------------------------------


def test_int8_rounds_each_row_to_127_steps():
    """A hand-sized example: a row's largest weight is exact, the others are off by half a step at
    most; the bias stays."""
    linear = Linear(3, 2)
    linear.weight.data = torch.tensor([[1.27, -0.604, 0.0], [0.0, 0.0, 0.0]])
    small = fast.Int8Linear(linear)
    assert small.weight.tolist() == [[127, -60, 0], [0, 0, 0]]
    x = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(small(x)[0], linear.bias + torch.tensor([0.67, 0.0]))


def test_int8_replaces_the_linear_maps_of_the_video_blocks_alone(model):
    """The samples move by less than two percent of their size; nothing else is replaced."""
    inputs, noise = given(model), noises(model)
    small = quantise(deepcopy(model))
    replaced = {name for name, part in small.named_modules() if type(part) is fast.Int8Linear}
    linear = {name for name, part in model.named_modules() if type(part) is Linear}
    assert replaced == {name for name in linear if name.startswith("video.blocks.")}
    pairs = zip(outcome(small, "joint", inputs, noise), outcome(model, "joint", inputs, noise))
    assert all(0 < (x - y).norm() / y.norm() < 0.02 for x, y in pairs)
