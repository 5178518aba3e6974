"""The frozen networks in front of Motus: a folder of ours and one of published weights compute the
same; prepared text stands in for its encoder; a digest tells which networks made something."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from backbones.frozen import Backbones, moving_places
from backbones.published import read_tokenizer
from backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from backbones.umt5 import UMT5Config, UMT5Encoder
from backbones.wan_vae import WanVAE, WanVAEConfig
from weights import files
from weights.load import save_part

SENTENCES = ["put the red disc at the top", "push the blue disc to the left"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
PROMPT = ["user", "assistant"]
VAE = WanVAEConfig(
    dim=8,
    dec_dim=8,
    z_dim=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    mean=(0.1, -0.2, 0.3, 0.0),
    std=(0.5, 1.0, 2.0, 0.25),
)


def word_tokenizer(path: Path, specials: list[str]) -> Tokenizer:
    """A tokenizer with one id per word of the sentences."""
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    names = ["<pad>", "<unk>", *specials, *PROMPT, *words]
    vocabulary = {word: i for i, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.save(str(path))
    return read_tokenizer(path)


def vlm_size(tokens: Tokenizer) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vocab=tokens.get_vocab_size(),
        width=8,
        ffn=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=12,
        rope_theta=1e4,
        mrope=(2, 2, 2),
        image_token=tokens.token_to_id("<|image_pad|>"),
        vision_width=16,
        vision_ffn=24,
        vision_layers=2,
        vision_heads=2,
        taps=(0,),
        side=6,
        patch=8,
        merge=2,
        min_pixels=256,
        max_pixels=2304,
    )


QWEN = {
    "text_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "mrope_section": [2, 2, 2],
            "mrope_interleaved": True,
            "rope_type": "default",
        },
    },
    "vision_config": {
        "depth": 2,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
        "patch_size": 8,
    },
}
PREPROCESSOR = {"size": {"shortest_edge": 256, "longest_edge": 2304}, "patch_size": 8}


@pytest.fixture(scope="module")
def houses(tmp_path_factory) -> tuple[Path, Path]:
    """The same random backbones in a folder of ours and in the published layout."""
    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    torch.manual_seed(0)
    words = word_tokenizer(ours / "text.json", ["</s>"])
    size = vlm_size(word_tokenizer(ours / "vlm.json", SPECIALS))
    text = UMT5Config(
        vocab=words.get_vocab_size(), dim=12, dim_attn=8, dim_ffn=16, heads=2, layers=2
    )
    vae, text, vlm = WanVAE(VAE), UMT5Encoder(text), Qwen3VL(size)
    for name, part in (("vae", vae), ("text", text), ("vlm", vlm)):
        save_part(ours / f"{name}.safetensors", part)
    wan, qwen = theirs / "wan", theirs / "qwen3vl"
    (wan / "google" / "umt5-xxl").mkdir(parents=True)
    qwen.mkdir()
    torch.save(vae.state_dict(), wan / "Wan2.2_VAE.pth")
    torch.save(text.state_dict(), wan / "models_t5_umt5-xxl-enc-bf16.pth")
    (wan / "config.json").write_text(json.dumps(dict(latents_mean=VAE.mean, latents_std=VAE.std)))
    shutil.copy(ours / "text.json", wan / "google" / "umt5-xxl" / "tokenizer.json")
    tensors = {f"model.{name}": tensor for name, tensor in vlm.state_dict().items()}
    files.save_safetensors(qwen / "model.safetensors", tensors)
    shutil.copy(ours / "vlm.json", qwen / "tokenizer.json")
    (qwen / "config.json").write_text(json.dumps(QWEN | {"image_token_id": size.image_token}))
    (qwen / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return ours, theirs


def frames() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32, 3), np.uint8))


def equal(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_published_backbones_compute_what_ours_do(houses):
    """VAE, UMT5 and Qwen3-VL in the published layout: the same inputs, bit for bit; the decoder is
    bf16, and pictures differ by that."""
    ours, theirs = (Backbones.load(folder, 16) for folder in houses)
    seen = ours.conditions(frames(), SENTENCES)
    assert list(seen) == ["latents", "moves", "context", "context_len", "und", "und_mask"]
    assert equal(seen, theirs.conditions(frames(), SENTENCES))
    assert theirs.vae.conv1.weight.dtype == torch.float32
    assert theirs.vae.decoder.conv1.weight.dtype == torch.bfloat16
    pictures = [house.decode_video(seen["latents"]).float() for house in (ours, theirs)]
    error = (pictures[0] - pictures[1]).square().mean()
    assert 10 * torch.log10(255**2 / error) > 45  # decibels


@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_gives_the_parts_that_are_asked_for(houses, which):
    """The VLM is not read for stage 1, nor anything but the text encoder to prepare text."""
    backbones = Backbones.load(houses[which], 16, ("vae", "text"))
    assert backbones.vlm is None and set(backbones.fingerprint()) == {"vae", "text"}
    seen = backbones.conditions(frames(), SENTENCES, und=False)
    assert seen["und"] is None and seen["und_mask"] is None
    alone = Backbones.load(houses[which], 16, ("text",))
    assert alone.vae is None and torch.equal(alone.encode_text(SENTENCES)[0], seen["context"])


def test_a_place_moves_where_any_of_its_pixels_does():
    """In any frame of its latent, by more than a tenth of the range, in any colour."""
    frames = torch.full((2, 9, 8, 8, 3), 100, dtype=torch.uint8)
    frames[0, 3, 5, 1, 2] = 74  # of the first latent after the observation
    frames[0, 5, 0, 7, 0] = 126  # of the second
    frames[1, 2] = 125  # a brighter light
    latents = torch.zeros(2, 7, 3, 2, 2)
    moves = moving_places(frames, latents)
    assert moves.nonzero().tolist() == [[0, 1, 1, 0], [0, 2, 0, 1]]
    assert moving_places(frames[:, :1], latents[:, :, :1]) is None


def test_everything_is_frozen_and_the_first_frame_alone_makes_the_first_latent(houses):
    """No parameter learns; latents of one frame are the first of those of five."""
    backbones = Backbones.load(houses[0], 16)
    assert not any(p.requires_grad for p in backbones.parameters()) and not backbones.training
    whole, first = backbones.encode_video(frames()), backbones.encode_video(frames()[:, :1])
    assert whole.shape[2] == 2 and first.shape[2] == 1
    torch.testing.assert_close(whole[:, :, :1], first)


def test_a_fingerprint_changes_with_weights_and_with_the_tokenizer(houses, tmp_path):
    """Each part has its own; a tokenizer with other words is another part."""
    backbones = Backbones.load(houses[0], 16)
    before = backbones.fingerprint()
    assert set(before) == set(Backbones.PARTS) and backbones.fingerprint("vae") == {
        "vae": before["vae"]
    }
    changed = Backbones.load(houses[0], 16)
    changed.vae.conv1.weight.data += 1
    for part in (changed.text_tokenizer.tokenizer, changed.vlm_tokenizer):
        part.add_special_tokens([AddedToken("<new>", normalized=False)])
    assert not set(before.values()) & set(changed.fingerprint().values())


def test_prepared_text_stands_in_for_the_text_encoder(houses, tmp_path):
    """Backbones without a text encoder read its states, and name an instruction they lack."""
    file = tmp_path / "states.safetensors"
    whole = Backbones.load(houses[1], 16)
    expected = whole.conditions(frames(), SENTENCES)
    whole.save_text(file)
    light = Backbones.load(houses[1], 16, ("vae", "vlm")).load_text(file, 12)
    assert light.text is None and light.fingerprint() == whole.fingerprint()
    assert equal(light.conditions(frames(), SENTENCES), expected)
    message = "'fly' is among no prepared text states(.|\n)*--encode-text"
    with pytest.raises(ValueError, match=message):
        light.conditions(frames(), ["fly", "fly"])


def test_text_states_of_another_encoder_are_refused(houses, tmp_path):
    """The digest of encoder and tokenizer decides; so does the width."""
    backbones = Backbones.load(houses[0], 16, ("text",))
    backbones.encode_text(SENTENCES)
    backbones.save_text(tmp_path / "a.safetensors")
    other = Backbones.load(houses[0], 16, ("text",))
    other.load_text(tmp_path / "a.safetensors", 12)
    other.text.norm.weight.data += 1
    other.digests.clear()
    with pytest.raises(ValueError, match="made by text encoder"):
        other.load_text(tmp_path / "a.safetensors", 12)
    for path, width in ((tmp_path / "a.safetensors", 48), (houses[0] / "text.safetensors", 12)):
        with pytest.raises(ValueError, match=f"no text states of width {width}"):
            other.load_text(path, width)
