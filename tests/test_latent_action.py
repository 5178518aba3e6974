"""Latent actions: an exact colour code, a loss whose parts do what they say, and training that sees
the labels it is given."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latent_action
from backbones import optical_flow
from latent_action import (
    LatentActionConfig,
    LatentActionModel,
    colour_to_flow,
    encode_flows,
    flow_to_colour,
    mixed_rows,
)
from motus import PRESETS

TOY = LatentActionConfig.of(PRESETS["toy"].latent)


def directions(radius: float, n: int = 64) -> torch.Tensor:
    """Flow (1, n, n, 2): n directions, seams included, times n speeds from 0 to the radius."""
    angle, speed = torch.arange(n) * 2 * math.pi / n, torch.linspace(0, radius, n)
    return torch.stack([torch.outer(speed, angle.cos()), torch.outer(speed, angle.sin())], dim=-1)[
        None
    ]


def model_of(seed: int = 0, **changes) -> LatentActionModel:
    torch.manual_seed(seed)
    return LatentActionModel(replace(TOY, **changes)).eval()


def random_flow(n: int, side: int = 48, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, side, side, 2, generator=torch.Generator().manual_seed(seed))


def unknown(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(n, 3), torch.zeros(n, 3, dtype=torch.bool)


def settings(steps: int, batch: int, lr: float = 2e-3) -> SimpleNamespace:
    """How `fit` trains; train.Settings has these fields too."""
    return SimpleNamespace(
        steps=steps, batch=batch, lr=lr, warmup=50, floor=0.1, weight_decay=0.01, seed=0
    )


# ---- Colour ----


def test_colour_and_back_is_exact_up_to_the_radius():
    """The round trip errs below 1e-5 of the radius in float and below 1 % of it after rounding to 8
    bits, in every direction."""
    for radius in (5.0, 16.0, 32.0):
        flow = directions(radius)
        pictures = flow_to_colour(flow, radius)
        assert (colour_to_flow(pictures, radius) - flow).norm(dim=-1).max() < 1e-5 * radius
        rounded = ((pictures + 1) * 127.5).round() / 127.5 - 1
        assert (colour_to_flow(rounded, radius) - flow).norm(dim=-1).max() < 0.01 * radius


def test_colours_are_those_of_the_wheel():
    """Right is red, 55/4 steps on (down) is nearly yellow, left is cyan to blue, rest is white; 55
    steps of the published table agree."""
    ramps = [
        (15, 0, 1, 1),
        (6, 1, 0, -1),
        (4, 1, 2, 1),
        (11, 2, 1, -1),
        (13, 2, 0, 1),
        (6, 0, 2, -1),
    ]  # count, full, moving channel, way
    table = []
    for count, full, moving, way in ramps:
        for i in range(count):
            colour = [0, 0, 0]
            colour[full], part = 255, int(255 * i / count)
            colour[moving] = part if way > 0 else 255 - part
            table.append(colour)
    angle = torch.arange(55) * 2 * math.pi / 55
    flow = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, None]
    ours = (flow_to_colour(flow, 1.0)[0, :, 0].T + 1) * 127.5
    assert (ours - torch.tensor(table)).abs().max() < 1.01  # the table rounds down
    assert (flow_to_colour(torch.zeros(1, 1, 1, 2), 1.0) == 1).all()


def test_colour_has_no_seam_and_keeps_magnitude():
    """Directions just above and just below rightward have one colour, and twice the speed is twice
    the saturation in any company."""
    pair = torch.tensor([[1.0, 1e-6], [1.0, -1e-6]])[None, None]
    colours = flow_to_colour(pair, 1.0)[0, :, 0]
    assert (colours[:, 0] - colours[:, 1]).abs().max() < 1e-4
    slow, fast = flow_to_colour(
        torch.tensor([[1.0, 2.0]]).mT[None, None] * torch.tensor([1.0, 0.0]), 4.0
    )[0, :, 0].T
    assert torch.allclose(2 * (1 - slow), 1 - fast, atol=1e-6)


def test_too_fast_motion_keeps_its_direction():
    """Flow beyond the radius comes back at the radius."""
    flow = torch.zeros(1, 2, 2, 2)
    flow[0, 0, 0], flow[0, 1, 1] = torch.tensor([30.0, 40.0]), torch.tensor([3.0, 0.0])
    back = colour_to_flow(flow_to_colour(flow, 10.0), 10.0)
    assert torch.allclose(back[0, 0, 0], torch.tensor([6.0, 8.0]), atol=1e-3)


def test_imperfect_pictures_give_the_motion_of_the_nearest_hue():
    """Grey shows rest; a paler hue is a slower motion; what is beyond the range is the radius."""
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]
    for picture, speed in ((0 * red, 0.0), (0.5 * red, 4.0), (red, 8.0), (1.5 * red, 8.0)):
        flow = colour_to_flow(picture, 8.0)[0, 0, 0]
        assert torch.allclose(flow, torch.tensor([speed, 0.0]), atol=1e-4)


def test_resizing_scales_the_vectors():
    """A motion across the whole picture is one across the whole picture at any size, per axis."""
    flow = torch.ones(1, 48, 24, 2) * torch.tensor([24.0, 48.0])
    assert torch.allclose(
        optical_flow.resize_flow(flow, 32), torch.full((1, 32, 32, 2), 32.0), atol=1e-4
    )


def test_planes_and_back_are_exact_and_opposite_motions_are_opposite_numbers():
    """The linear code returns flow up to the radius, keeps the direction of what is faster, and
    changes sign with the motion."""
    flow = directions(5.0)
    assert (latent_action.planes_to_flow(latent_action.flow_to_planes(flow, 5.0), 5.0) - flow).norm(
        dim=-1
    ).max() < 1e-5
    fast = torch.tensor([30.0, 40.0])[None, None, None]
    pictures = latent_action.flow_to_planes(fast, 10.0)
    assert (
        torch.allclose(latent_action.planes_to_flow(pictures, 10.0), torch.tensor([6.0, 8.0]))
        and pictures.abs().max() <= 1
    )
    assert torch.equal(
        latent_action.flow_to_planes(-flow, 5.0)[:, :2],
        -latent_action.flow_to_planes(flow, 5.0)[:, :2],
    )
    with pytest.raises(ValueError, match="wheel, planes"):
        replace(TOY, code="hsv")


# ---- The model ----


def test_presets_give_four_tokens():
    """The full size has the paper's 4 x 512 features, the small one four tokens too; the toy has
    nine of 32, at the size of its world."""
    for name, positions, features in (("toy", 9, 288), ("small", 4, 512), ("full", 4, 2048)):
        with torch.device("meta"):
            model = LatentActionModel(LatentActionConfig.of(PRESETS[name].latent))
        assert (
            model.grid**2 == positions
            and model.token_mean.shape == (features,)
            and model.encoder[-1].out_features == 28
        )


def test_shapes_of_the_way_there_and_back():
    """Flow of any size to tokens, to 14 numbers, to flow of the picture's size."""
    model, flow = model_of(), random_flow(3, side=48)
    tokens = model.flow_to_tokens(flow)
    mu, logvar = model.tokens_to_latent(tokens)
    assert (
        tokens.shape == (3, 288)
        and mu.shape == logvar.shape == (3, 14)
        and not tokens.requires_grad
    )
    assert model.latent_to_tokens(mu).shape == (3, 288) and model.tokens_to_flow(
        model.latent_to_tokens(mu)
    ).shape == (3, 48, 48, 2)


def test_loss_equals_its_definition():
    """With noise of almost no size the three terms are those of the docstring, and total is their
    weighted sum."""
    model = model_of(lambda_action=0.5, beta=0.01)
    torch.nn.init.constant_(model.encoder[-1].bias[14:], -40.0)  # clamped to -12
    tokens = torch.randn(4, 288, generator=torch.Generator().manual_seed(1))
    model.token_std, model.token_mean = torch.std_mean(tokens, dim=0)
    actions = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]) > 0
    loss = model.loss(tokens, actions, mask, torch.Generator().manual_seed(3))
    mu, logvar = model.tokens_to_latent(tokens)
    known = [(actions[i, j] - mu[i, j]) ** 2 for i, j in ((0, 0), (0, 1), (2, 2))]
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / 4
    assert torch.isclose(loss["alignment"], sum(known) / 3) and torch.isclose(loss["kl"], kl)
    assert torch.isclose(
        loss["reconstruction"], ((model.decoder(mu) - model.whiten(tokens)) ** 2).mean(), rtol=1e-2
    )
    assert torch.isclose(
        loss["total"], loss["reconstruction"] + 0.5 * loss["alignment"] + 0.01 * loss["kl"]
    )


def test_unlabelled_rows_feel_no_alignment():
    """Masked labels, NaN included, change neither loss nor gradient; a batch without labels has
    alignment 0."""
    model, tokens = model_of(), torch.randn(4, 288)
    actions, mask = unknown(4)
    mask[0] = True
    gradients = []
    for filler in (0.0, float("nan"), 1e30):
        actions[1:] = filler
        model.zero_grad()
        model.loss(tokens, actions, mask, torch.Generator().manual_seed(0))["total"].backward()
        gradients.append(model.encoder[0].weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert model.loss(tokens, *unknown(4))["alignment"] == 0


def test_dcae_is_frozen_unless_asked():
    """By default no gradient reaches the DC-AE and its batch statistics stay; with finetune_dcae
    the picture loss trains it."""
    frozen, flow = model_of(), random_flow(2)
    frozen.loss(flow, *unknown(2))["total"].backward()
    assert all(p.grad is None for p in frozen.dcae.parameters()) and not frozen.dcae.training
    tuned = model_of(finetune_dcae=True, reconstruct="picture", moving=10.0)
    tuned.loss(flow, *unknown(2))["total"].backward()
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in tuned.dcae.parameters())
        and not tuned.dcae.training
    )
    with pytest.raises(ValueError, match="finetune_dcae=True"):
        replace(TOY, finetune_dcae=True)


def test_paper_form_reaches_the_encoder_through_the_frozen_decoder():
    """reconstruct="picture" with a frozen DC-AE trains both MLPs."""
    model = model_of(reconstruct="picture")
    model.loss(random_flow(2), *unknown(2))["total"].backward()
    assert (
        model.encoder[0].weight.grad.abs().sum() > 0
        and model.decoder[0].weight.grad.abs().sum() > 0
    )


def test_bad_labels_and_flow_are_refused():
    """Labels of another length, NaN where the mask says known, flow that is not finite or of
    another shape: one clear error each."""
    model, tokens = model_of(), torch.randn(4, 288)
    actions, mask = unknown(4)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        model.loss(tokens, actions[:3], mask[:3])
    actions[2, 1], mask[2, 1] = float("nan"), True
    with pytest.raises(ValueError, match="mask out what is not known"):
        model.loss(tokens, actions, mask)
    flow = random_flow(2)
    flow[1, 3, 3, 0] = float("inf")
    with pytest.raises(ValueError, match="1 values that are not finite"):
        model.flow_to_tokens(flow)
    with pytest.raises(ValueError, match="expected"):
        model.flow_to_tokens(random_flow(2)[..., 0])


def test_save_and_load_give_the_same_latents_and_refuse_other_pictures(tmp_path):
    """A file brings weights, statistics and configuration; a DC-AE of another radius is refused by
    name of the field."""
    model, flow = model_of(), random_flow(5)
    tokens = model.flow_to_tokens(flow)
    model.token_std, model.token_mean = torch.std_mean(tokens, dim=0)
    with torch.no_grad():
        mu, _ = model.tokens_to_latent(tokens)
    model.latent_std, model.latent_mean = torch.std_mean(mu, dim=0)
    model.save(tmp_path / "model.safetensors")
    again = LatentActionModel.load(tmp_path / "model.safetensors")
    assert again.config == model.config and not again.training
    read, _ = again.tokens_to_latent(again.flow_to_tokens(flow))
    assert torch.equal(again.standardise(read), model.standardise(mu))
    assert again.fingerprint() == model.fingerprint() != model_of(1).fingerprint()
    model.save_dcae(tmp_path / "dcae.safetensors")
    with pytest.raises(ValueError, match="no latent-action configuration"):
        LatentActionModel.load(tmp_path / "dcae.safetensors")
    with pytest.raises(ValueError, match="radius=7.5 instead of 7.0"):
        model_of(radius=7.0).load_dcae(tmp_path / "dcae.safetensors")
    other = model_of(1)
    other.load_dcae(tmp_path / "dcae.safetensors")
    assert torch.allclose(other.flow_to_tokens(flow), tokens, atol=0.05)


# ---- Training ----


def test_a_tenth_of_the_rows_is_labelled_and_training_resumes_anywhere():
    """After n steps the labelled rows number n * share within 1; over seeds they average to it; a
    batch depends on seed and step only."""
    labelled = torch.arange(100) < 20
    counts = [labelled[mixed_rows(labelled, 16, 0.1, 3, step)].sum().item() for step in range(200)]
    assert set(counts) <= {1, 2} and abs(sum(counts) - 320) <= 1
    drawn = mixed_rows(labelled, 16, 0.1, 3, 77)
    assert len(drawn) == 16 and torch.equal(drawn, mixed_rows(labelled, 16, 0.1, 3, 77))
    first = [labelled[mixed_rows(labelled, 16, 0.1, seed, 0)].sum().item() for seed in range(400)]
    assert abs(np.mean(first) - 1.6) < 0.08
    labels, mask = unknown(5)
    with pytest.raises(ValueError, match="0 rows are labelled and 5 are not.*--labelled 0.1"):
        latent_action.fit(model_of(), (torch.zeros(5, 288), labels, mask), settings(1, 4))


def test_other_bodies_keep_the_motion():
    """Shifted and thickened flow has the vectors of the original and no others, in at least as many
    places."""
    flow = torch.zeros(6, 32, 32, 2)
    flow[:, 14:17, 14:17] = torch.tensor([2.0, -1.0])
    made = optical_flow.other_bodies(flow, torch.Generator().manual_seed(0))
    assert {tuple(v) for v in made.reshape(-1, 2).tolist()} == {(0.0, 0.0), (2.0, -1.0)}
    assert ((made[..., 0] != 0).sum((1, 2)) >= 9).all() and not torch.equal(made, flow)


def test_alignment_makes_the_first_latents_the_motion():
    """On toy features that hold the motion linearly, a short training recovers labels on unlabelled
    rows directly, without a probe; with lambda 0 it does not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(600, 3, generator=generator) * 2 - 1
    tokens = torch.cat([labels, torch.randn(600, 5, generator=generator)], dim=1) @ torch.randn(
        8, 288, generator=generator
    )
    labelled, direct = torch.arange(600) < 200, {}
    for weight in (0.0, 1.0):
        model = model_of(lambda_action=weight, hidden=(64,))
        rows = (tokens, labels, labelled[:, None].expand(-1, 3))
        latent_action.fit(model, rows, settings(150, 64, 5e-3))
        mu = model.tokens_to_latent(tokens)[0].detach()
        direct[weight] = (
            1 - (mu[200:, :3] - labels[200:]).square().sum() / labels[200:].square().sum()
        )
        assert latent_action.probe(mu[:200], labels[:200], mu[200:], labels[200:]).min() > 0.9
    assert direct[1.0] > 0.9 and direct[0.0] < 0.5


def test_mirrors_turn_flow_and_labels_together():
    """In a mirror a motion to the right is one to the left, of the mirrored pixel; the opening
    stays. All four mirrors occur."""
    flow, labels = torch.zeros(1, 8, 8, 2), torch.tensor([[0.3, -0.2, 0.5]])
    flow[0, 1, 2] = torch.tensor([3.0, -2.0])
    seen = set()
    for seed in range(20):
        made, label = optical_flow.mirrored(flow, labels, torch.Generator().manual_seed(seed))
        sign = label[0, :2] / labels[0, :2]
        x, y = (2 if sign[0] > 0 else 5), (1 if sign[1] > 0 else 6)
        assert (
            torch.equal(made[0, y, x], flow[0, 1, 2] * sign)
            and (made != 0).sum() == 2
            and label[0, 2] == 0.5
        )
        seen.add(tuple(sign.tolist()))
    assert len(seen) == 4


@pytest.mark.parametrize("finetune", [False, True])
def test_training_on_flow_tunes_the_dcae_only_if_asked(finetune):
    """`fit` takes flow if pictures are reconstructed; the DC-AE changes with finetune_dcae alone,
    and statistics fit the final tokens."""
    model, flow = (
        model_of(finetune_dcae=finetune, reconstruct="picture", moving=10.0),
        random_flow(12),
    )
    before = {k: v.clone() for k, v in model.dcae.state_dict().items()}
    labels, mask = unknown(12)
    mask[:4] = True
    latent_action.fit(model, (flow, labels, mask), settings(2, 4), fraction=0.5)
    changed = [k for k, v in model.dcae.state_dict().items() if not torch.equal(v, before[k])]
    assert bool(changed) == finetune and not any("running" in k for k in changed)
    z = model.standardise(model.tokens_to_latent(model.flow_to_tokens(flow))[0])
    assert z.mean(dim=0).abs().max() < 1e-3 and (z.std(dim=0) - 1).abs().max() < 1e-3


def test_flow_becomes_tokens_once_if_tokens_are_reconstructed():
    """Flow and its tokens are the same rows to a model with a frozen DC-AE."""
    flow = random_flow(12)
    labels, mask = unknown(12)
    mask[:4] = True
    latents = []
    for x in (flow, model_of().flow_to_tokens(flow)):
        model = model_of()
        latent_action.fit(model, (x, labels, mask), settings(2, 4), fraction=0.5)
        latents.append(model.tokens_to_latent(model.flow_to_tokens(flow))[0])
    assert torch.allclose(latents[0], latents[1], atol=1e-6)


def test_augmented_rows_begin_with_the_given_ones_and_repeat_what_is_labelled():
    """Rows 0 to N are as they were; those after are labelled, the rare motions among them twice as
    often."""
    flow, labels = random_flow(40, side=16), torch.rand(40, 3) + 0.2
    labels[:, 2] = 0.0
    labels[::4, 2] = 0.5  # the rare one
    mask = (torch.arange(40) < 20)[:, None].expand(-1, 3)
    rare = optical_flow.rarest_motions(labels, mask)
    assert rare.tolist() == [0, 4, 8, 12, 16]
    made, told, known = optical_flow.augmented(flow, labels, mask)
    assert len(made) == len(told) == len(known) == 40 + 2 * (20 + 5)
    assert torch.equal(made[:40], flow) and torch.equal(told[:40], labels)
    assert torch.equal(known[:40], mask) and known[40:].all()
    assert torch.allclose(told[40:60].abs(), labels[:20]) and (told[60:65, 2] == 0.5).all()
    again = optical_flow.augmented(flow, labels, mask)
    assert all(torch.equal(a, b) for a, b in zip((made, told, known), again))


def test_what_is_never_known_or_never_moves_is_not_the_rarest_motion():
    """A dimension that an embodiment lacks, or that stands still, is not what moves seldom."""
    labels, mask = torch.ones(6, 3), torch.ones(6, 3, dtype=torch.bool)
    mask[:, 0], labels[:, 1] = False, 0.0
    labels[:4, 2] = 0.0
    assert optical_flow.rarest_motions(labels, mask).tolist() == [4, 5]


# ---- Clips ----


def test_a_clip_is_encoded_chunk_by_chunk_with_its_figures():
    """Rows equal the model on each flow, whatever the chunks; the share of the moving pixels that
    is too fast is counted; a clip without a valid row is refused."""
    model, flow = model_of(), torch.zeros(5, 48, 48, 2)
    flow[:, 10:20, 10:20, 0], flow[:, 20:30, 20:30, 1] = 5.0, 50.0
    valid = torch.tensor([True] * 3 + [False] * 2)
    whole, figures = encode_flows(model, [(flow, valid)])
    parts, _ = encode_flows(model, zip(flow.split(2), valid.split(2)))
    mu, logvar = model.tokens_to_latent(model.flow_to_tokens(flow))
    assert torch.allclose(whole["latent_action"], mu) and torch.allclose(whole["logvar"], logvar)
    assert whole.keys() == parts.keys() and torch.equal(whole["valid"], valid)
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in ("tokens", "logvar"))
    assert figures == {"rows": 5, "valid_rows": 3, "clipped": 0.5}
    with pytest.raises(ValueError, match="none of its 5 rows is usable: that takes 4 frames"):
        encode_flows(model, [(flow, ~valid & valid)])
