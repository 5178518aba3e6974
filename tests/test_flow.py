"""Two times: the official times, means that leave out what does not exist, and an Euler loop that
is exact where the path is straight."""

import pytest
import torch

import flow


def test_the_table_has_the_official_values():
    """Row i of the shift-5 table is 5 s / (1 + 4 s) with s = 1 - i / 1000; its mean and median lie
    far on the noisy side."""
    table = flow.official_table()
    published = {
        0: 1.0,
        250: 0.9375,
        500: 0.83333,
        750: 0.625,
        900: 0.35714,
        950: 0.20833,
        990: 0.04808,
        999: 0.00498,
    }
    for row, time in published.items():
        assert table[row].item() == pytest.approx(time, abs=5e-6)
    assert table.mean().item() == pytest.approx(0.7476, abs=1e-4)
    assert table.median().item() == pytest.approx(0.8336, abs=1e-3)
    assert (table >= 0.9).float().mean().item() == pytest.approx(0.358, abs=1e-3)


def test_training_times_are_rows_of_the_table_drawn_evenly():
    """Official times are rows of the table, in equal shares of its halves; a seed repeats them."""
    times = flow.official_times(4000, torch.Generator().manual_seed(0))
    assert torch.isin(times, flow.official_table()).all()
    assert (times > 0.83333).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(times, flow.official_times(4000, torch.Generator().manual_seed(0)))


def test_logit_normal_times_are_what_the_paper_states():
    """The logit of a logit-normal time is standard normal."""
    times = flow.logit_normal_times(20000, torch.Generator().manual_seed(0))
    assert torch.logit(times).mean().item() == pytest.approx(0.0, abs=0.02)
    assert torch.logit(times).std().item() == pytest.approx(1.0, abs=0.02)


def test_sampling_times_run_from_noise_to_data():
    """Ten uniform steps are tenths; a shift moves the inner times towards noise and leaves the
    ends."""
    assert torch.allclose(flow.sampling_times(10), torch.arange(10, -1, -1) / 10)
    moved = flow.sampling_times(10, shift=5.0)
    assert moved[0] == 1 and moved[-1] == 0 and (moved[1:-1] > flow.sampling_times(10)[1:-1]).all()
    with pytest.raises(ValueError, match="steps is 0"):
        flow.sampling_times(0)


def test_mixing_ends_at_data_and_at_noise():
    """t = 0 is the data and t = 1 the noise, bit for bit, each sample with its own t."""
    data, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    mixed = flow.mix(data, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], data[0]) and torch.equal(mixed[1], noise[1])
    assert torch.allclose(mixed[2], 0.75 * data[2] + 0.25 * noise[2])


def test_masked_means_leave_out_what_does_not_exist():
    """A hand-sized example: the mean is over True entries only, and 0 for a row that has none."""
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, 6.0, 7.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert flow.masked_mean(x, mask).tolist() == [2.0, 6.0, 0.0]
    assert flow.masked_mean(x, None).tolist() == pytest.approx([104 / 3, 6.0, 9.0])


def test_the_observation_carries_no_loss_but_counts_in_the_mean():
    """With an error of 1 everywhere, three latent frames give 2/3; without the padded last one,
    1/2."""
    velocity, target = torch.ones(2, 4, 3, 2, 2), torch.zeros(2, 4, 3, 2, 2)
    assert flow.video_loss(velocity, target).tolist() == pytest.approx([2 / 3] * 2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert flow.video_loss(velocity, target, mask).tolist() == pytest.approx([2 / 3, 1 / 2])


def test_padded_actions_carry_no_loss():
    """An error in a masked step or dimension changes nothing."""
    velocity, mask = torch.ones(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)
    mask[:, 2], mask[:, :, 1] = False, False
    velocity[~mask] = 1000.0
    assert flow.action_loss(velocity, torch.zeros(1, 3, 2), mask).tolist() == [1.0]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_is_exact_on_straight_paths(steps):
    """Where the velocity is noise - data, any number of steps lands on the data."""
    video, action, noise_v, noise_a = (
        torch.randn(2, 3, 2, 2, 2),
        torch.randn(2, 4, 3),
        torch.randn(2, 3, 2, 2, 2),
        torch.randn(2, 4, 3),
    )
    sampled = flow.sample(
        lambda *_: (noise_v - video, noise_a - action),
        noise_v,
        noise_a,
        video[:, :, :1],
        "joint",
        steps,
    )
    assert torch.allclose(sampled[0], video, atol=1e-6) and torch.allclose(
        sampled[1], action, atol=1e-6
    )


def test_the_observation_is_put_back_after_every_step():
    """Every evaluation sees the clean observation as the first latent frame, whatever velocity it
    is given, and so does the result."""
    observation, seen = torch.randn(2, 3, 1, 2, 2), []

    def velocity(video, action, times):
        seen.append(video[:, :, :1].clone())
        return torch.ones_like(video), torch.ones_like(action)

    video, _ = flow.sample(
        velocity, torch.randn(2, 3, 2, 2, 2), torch.randn(2, 4, 3), observation, "joint", 4
    )
    assert len(seen) == 4 and all(
        torch.equal(frame, observation) for frame in [*seen, video[:, :, :1]]
    )


def test_an_unknown_mode_names_the_modes_there_are():
    """The error lists what is allowed."""
    with pytest.raises(
        ValueError, match="mode is 'policy'; expected one of joint, vla, world_model, idm, vgm"
    ):
        flow.sample(
            None, torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1), "policy"
        )


def test_a_given_modality_is_at_time_zero_and_never_both():
    """In the asked share of the samples one modality is at t = 0, either equally often; the other
    keeps its time."""
    t_video, t_action = torch.full((4000,), 0.3), torch.full((4000,), 0.6)
    video, action = flow.pin_modality(t_video, t_action, 0.4, torch.Generator().manual_seed(0))
    assert not ((video == 0) & (action == 0)).any()
    assert (
        abs((video == 0).float().mean() - 0.2) < 0.02
        and abs((action == 0).float().mean() - 0.2) < 0.02
    )
    assert torch.equal(video[video > 0], t_video[video > 0]) and torch.equal(
        action[action > 0], t_action[action > 0]
    )


def test_what_moves_weighs_more_and_a_sample_as_much_as_before():
    """The weight of a place by hand; its mean over the frames to come is 1, whatever moves."""
    moves = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    moves[0, 1, 0, 0] = moves[0, 2, 1, 1] = True
    weight = flow.moving_weight(moves, 8.0)
    assert weight.shape == (2, 1, 3, 2, 2)
    assert torch.allclose(
        weight[0] / weight[0, 0, 1, 1, 1],
        1 + 8 * torch.tensor([[[0, 0], [0, 0]], [[1.0, 0], [0, 0]], [[0, 0], [0, 1.0]]]),
    )
    assert torch.allclose(weight[:, :, 1:].mean(dim=(1, 2, 3, 4)), torch.ones(2))
    assert torch.equal(weight[1], torch.ones(1, 3, 2, 2))
    assert flow.moving_weight(moves, 0.0) is None and flow.moving_weight(None, 0.0) is None
    with pytest.raises(ValueError, match="encode them again"):
        flow.moving_weight(None, 8.0)


def test_a_weighted_video_loss_is_the_weighted_mean_of_squares():
    torch.manual_seed(0)
    velocity, target = torch.randn(2, 2, 4, 3, 3, 3)
    weight = torch.rand(2, 1, 3, 3, 3)
    slow = [
        sum(
            (weight[b, 0, t] * (velocity[b, c, t] - target[b, c, t]) ** 2).sum() / (4 * 9)
            for t in (1, 2)
            for c in range(4)
        )
        / 3
        for b in range(2)
    ]
    assert torch.allclose(flow.video_loss(velocity, target, weight=weight), torch.stack(slow))
