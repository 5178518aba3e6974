"""Qwen3-VL against transformers: hidden states, images and prompts, at tiny random sizes."""

import numpy as np
import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from backbones.qwen3vl import (
    Qwen3VL,
    Qwen3VLConfig,
    pad_prompts,
    prepare_image,
    prompt_ids,
    smart_resize,
)
from weights.layouts import rename_from

qwen_own = rename_from("qwen3vl")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE_ID = 155
TINY = dict(
    vocab=160,
    width=48,
    ffn=80,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mrope=(4, 2, 2),
    image_token=IMAGE_ID,
    vision_width=32,
    vision_ffn=56,
    vision_layers=3,
    vision_heads=2,
    taps=(1,),
    side=6,
    patch=4,
    min_pixels=64,
    max_pixels=4096,
)
CONFIGS = {
    "toy: square images of one grid": (Qwen3VLConfig(**TINY), [(1, 4, 4)] * 3, [[0], [1], [2]]),
    "frequencies and taps of the full size, odd widths, images wider and taller than the table": (
        Qwen3VLConfig(
            **TINY
            | dict(
                width=56,
                ffn=76,
                layers=4,
                heads=6,
                kv_heads=3,
                head_dim=128,
                mrope=(24, 20, 20),
                vision_width=60,
                vision_heads=3,
                vision_ffn=52,
                vision_layers=4,
                taps=(0, 1, 2),
            )
        ),
        [(1, 8, 6), (1, 4, 10)],
        [[0], [1]],
    ),
    "one key head, two images in one prompt and one in the other, a grid of one block": (
        Qwen3VLConfig(
            **TINY
            | dict(
                heads=3,
                kv_heads=1,
                head_dim=32,
                mrope=(6, 5, 5),
                vision_heads=1,
                vision_width=20,
                taps=(0, 2),
                side=3,
                patch=2,
                merge=3,
            )
        ),
        [(1, 3, 3), (1, 9, 6), (1, 3, 3)],
        [[0, 1], [2]],
    ),
}


def oracle(config):
    """The same sizes in transformers, eager attention, all parameters drawn away from zero and
    identity."""
    transformers = pytest.importorskip("transformers")
    c = config
    ids = dict(
        image_token_id=c.image_token,
        video_token_id=156,
        vision_start_token_id=153,
        vision_end_token_id=154,
    )
    text = dict(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.eps,
        pad_token_id=0,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="default",
            rope_theta=c.rope_theta,
            mrope_section=list(c.mrope),
            mrope_interleaved=True,
        ),
    )
    vision = dict(
        depth=c.vision_layers,
        hidden_size=c.vision_width,
        intermediate_size=c.vision_ffn,
        num_heads=c.vision_heads,
        out_hidden_size=c.width,
        num_position_embeddings=c.side**2,
        deepstack_visual_indexes=list(c.taps),
        patch_size=c.patch,
        spatial_merge_size=c.merge,
        temporal_patch_size=c.repeat,
    )
    model = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
        )
    ).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(
            parameter,
            std=0.5 if parameter.dim() == 1 else (2 / parameter.flatten(1).shape[1]) ** 0.5,
        )
    return model


def inputs(config, grids, images_of):
    """Random prompts of different lengths around the images, padded on the right, and random
    patches."""
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for row, images in enumerate(images_of):
        prompt = torch.randint(1, 150, (3 + row,), generator=generator).tolist()
        for image in images:
            prompt += (
                [153]
                + [config.image_token] * (grids[image][1] * grids[image][2] // config.merge**2)
                + [154]
            )
        prompts.append(prompt + torch.randint(1, 150, (2 + 3 * row,), generator=generator).tolist())
    ids, mask = pad_prompts(prompts)
    patches = sum(h * w for _, h, w in grids)
    return (
        ids,
        mask,
        torch.randn(patches, 3 * config.repeat * config.patch**2, generator=generator),
        torch.tensor(grids),
    )


@torch.no_grad()
def run_oracle(model, ids, mask, pixels, grid):
    kinds = (ids == model.config.image_token_id).int()
    return (
        model.model(
            input_ids=ids,
            attention_mask=mask.long(),
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
        )
        .last_hidden_state[mask]
        .float()
    )


def build(config, model):
    """Our model with the weights of the oracle, loaded through the rename."""
    with torch.device("meta"):
        ours = Qwen3VL(config)
    names = {qwen_own(name): tensor for name, tensor in model.state_dict().items()}
    names.pop(None)
    ours.load_state_dict(names, assign=True)
    return ours.eval()


def test_the_full_model_has_the_published_parameters():
    """2,127,532,032 parameters in 625 tensors, 406,957,056 of them in the vision tower, counted on
    the meta device."""
    with torch.device("meta"):
        model = Qwen3VL(Qwen3VLConfig())
    assert sum(p.numel() for p in model.parameters()) == 2_127_532_032
    assert sum(p.numel() for p in model.visual.parameters()) == 406_957_056
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(shapes) == 625
    assert shapes["visual.patch_embed.proj.weight"] == (1024, 3, 2, 16, 16)
    assert shapes["visual.deepstack_merger_list.2.norm.weight"] == (4096,)
    assert shapes["language_model.layers.27.mlp.down_proj.weight"] == (2048, 6144)
    assert (
        qwen_own("model.visual.pos_embed.weight") in shapes and qwen_own("lm_head.weight") is None
    )


@pytest.mark.parametrize("case", CONFIGS)
def test_hidden_states_equal_transformers_in_fp32(case):
    """The difference is below 1e-5 of the scale of the hidden states, at every token that is not
    padding."""
    config, grids, images_of = CONFIGS[case]
    model, batch = oracle(config), inputs(config, grids, images_of)
    expected = run_oracle(model, *batch)
    found = build(config, model)(*batch)[batch[1]]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CONFIGS)
def test_hidden_states_in_bf16_differ_from_transformers_by_no_more_than_its_own_rounding(case):
    """Our bf16 run is as near to the fp32 result as the bf16 run of transformers."""
    config, grids, images_of = CONFIGS[case]
    model, batch = oracle(config), inputs(config, grids, images_of)
    exact = run_oracle(model, *batch)
    model = model.to(torch.bfloat16)
    rounded = run_oracle(model, *batch)
    found = build(config, model)(*batch)[batch[1]].detach().float()
    own_rounding = (rounded - exact).norm()  # single draws scatter by 10 %
    assert (found - exact).norm() < 1.2 * own_rounding
    assert (found - rounded).norm() < 1.2 * own_rounding


def test_grouped_encoding_equals_encoding_one_image_at_a_time():
    """Images of mixed grids come back in their own order, whatever was encoded together."""
    config, grids, _ = CONFIGS["toy: square images of one grid"]
    torch.manual_seed(0)
    tower = Qwen3VL(config).visual
    grid = torch.tensor([(1, 4, 6), (1, 2, 2), (1, 4, 6), (1, 2, 8), (1, 2, 2)])
    pixels = torch.randn(int(grid.prod(dim=1).sum()), 3 * config.repeat * config.patch**2)
    alone = [
        tower(part, row[None]) for part, row in zip(pixels.split(grid.prod(dim=1).tolist()), grid)
    ]
    torch.testing.assert_close(tower(pixels, grid), torch.cat(alone, dim=1))


def test_padding_and_neighbours_leave_a_prompt_alone():
    """The hidden states of a prompt do not depend on the other prompts of its batch nor on how far
    it is padded."""
    config, grids, images_of = CONFIGS["toy: square images of one grid"]
    torch.manual_seed(0)
    model = Qwen3VL(config)
    ids, mask, pixels, grid = inputs(config, grids, images_of)
    together = model(ids, mask, pixels, grid)
    length = int(mask[0].sum())
    alone = model(ids[:1, :length], mask[:1, :length], pixels[:16], grid[:1])
    torch.testing.assert_close(together[:1, :length], alone)


def test_positions_of_an_image_follow_its_rows_and_columns():
    """Three words, a 3 x 2 image, three words, one pad: an example a reader can check by hand."""
    config = CONFIGS["toy: square images of one grid"][0]
    image = torch.tensor([[False] * 3 + [True] * 6 + [False] * 4])
    mask = torch.arange(13)[None] < 12
    with torch.device("meta"):
        model = Qwen3VL(config)
    time, row, column = model.positions(image, mask, torch.tensor([[1, 6, 4]]))[:, 0].tolist()
    assert time == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 1]
    assert row == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 1]
    assert column == [0, 1, 2, 3, 4, 3, 4, 3, 4, 6, 7, 8, 1]


def test_every_parameter_is_trainable():
    """A loss on the hidden states reaches every parameter, the position table and the DeepStack
    mergers included."""
    config, grids, images_of = CONFIGS["toy: square images of one grid"]
    torch.manual_seed(0)
    model = Qwen3VL(config)
    model.init_weights()
    model(*inputs(config, grids, images_of)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_wrong_inputs_are_refused_with_what_was_found():
    """Counts that do not agree, left padding and a wrong image are named."""
    config, grids, images_of = CONFIGS["toy: square images of one grid"]
    model = Qwen3VL(config)
    ids, mask, pixels, grid = inputs(config, grids, images_of)
    with pytest.raises(ValueError, match="12 image tokens"):
        model(ids, mask, pixels[:-16], grid[:-1])
    with pytest.raises(ValueError, match="padded on the right"):
        model(ids, mask.flip(1), pixels, grid)
    with pytest.raises(ValueError, match="float32"):
        prepare_image(np.zeros((8, 8, 3), np.float32), config)
    with pytest.raises(ValueError, match="mrope"):
        Qwen3VLConfig(mrope=(16, 16, 16))


# -- images ---------------------------------------------------------------------------------------


def picture(height, width):
    """A smooth pattern with edges and noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    return np.stack([(x * 3) % 200, (y * 5) % 200, ((x + y) // 16 % 2) * 200], axis=-1).astype(
        np.uint8
    ) + noise.astype(np.uint8)


def image_processor(config):
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    return processing.Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        patch_size=config.patch,
        merge_size=config.merge,
        temporal_patch_size=config.repeat,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


@pytest.mark.parametrize("size", [(384, 320), (240, 320), (128, 128), (100, 333), (300, 37)])
def test_prepared_images_equal_the_processor(size):
    """Same grid, same patches within one grey level (2/255 after scaling), for sizes that fit, grow
    and are rounded."""
    config = Qwen3VLConfig()
    image = picture(*size)
    expected = image_processor(config)(
        images=[image], input_data_format="channels_last", return_tensors="pt"
    )
    pixels, grid = prepare_image(image, config)
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    assert (pixels - expected["pixel_values"]).abs().max() < 2 / 255 + 1e-6


def test_too_large_images_shrink_as_the_processor_shrinks_them():
    """Above max_pixels both sides are scaled down; a toy image of 64 x 64 stays as it is."""
    config = Qwen3VLConfig(**TINY)
    image = picture(100, 300)
    expected = image_processor(config)(
        images=[image], input_data_format="channels_last", return_tensors="pt"
    )
    pixels, grid = prepare_image(image, config)
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    assert (pixels - expected["pixel_values"]).abs().max() < 2 / 255 + 1e-6
    assert prepare_image(picture(64, 64), config)[1].tolist() == [[1, 16, 16]]
    assert smart_resize(720, 1280, Qwen3VLConfig()) == (704, 1280)


def test_frames_that_fit_are_shown_pixel_by_pixel():
    """An official frame of 384 x 320 is not resampled: the first patch is its first corner."""
    image = picture(384, 320)
    pixels, grid = prepare_image(image, Qwen3VLConfig())
    assert grid.tolist() == [[1, 24, 20]]
    first = (pixels[0].view(3, 2, 16, 16)[:, 1] + 1) / 2 * 255
    torch.testing.assert_close(first, torch.from_numpy(image[:16, :16]).permute(2, 0, 1).float())


# -- prompts --------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    """A byte-level BPE of the Qwen kind, trained on a few sentences, with the special tokens behind
    it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        ["pick up the red cube", "user assistant\n", "put the blue bowl on the plate"], trainer
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


@pytest.mark.parametrize("sizes", [[(256, 256)], [(256, 320), (320, 256)]])
def test_prompts_equal_the_processor(sizes):
    """One user turn shows the text and then the images, and does not open the answer."""
    transformers = pytest.importorskip("transformers")
    config = Qwen3VLConfig()
    tokenizer = byte_tokenizer()
    text = "Pick up the red cube,\nthen café №5  "
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(SPECIAL)
    )
    pictures = [picture(*size) for size in sizes]
    processor = object.__new__(
        transformers.Qwen3VLProcessor
    )  # its video half would need torchvision
    processor.tokenizer, processor.image_processor, processor.image_token = (
        fast,
        image_processor(config),
        "<|image_pad|>",
    )
    parts = [{"type": "text", "text": text}] + [{"type": "image"}] * len(pictures)
    prompt = fast.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=CHAT,
        tokenize=False,
        add_generation_prompt=False,
    )
    found = processor.image_processor(images=pictures, input_data_format="channels_last")
    pieces = prompt.split("<|image_pad|>")
    pads = [processor.replace_image_token(found, i) for i in range(len(pictures))]
    expected = fast("".join(piece + pad for piece, pad in zip(pieces, [*pads, ""])))["input_ids"]
    grids = [prepare_image(p, config)[1][0] for p in pictures]
    assert prompt_ids(tokenizer, text, grids) == expected


def test_a_word_level_tokenizer_works_through_the_same_code():
    """The toy reads whole words; a tokenizer without the image tokens is refused by name."""
    words = ["<unk>", "user", "assistant", "push", "red", *SPECIAL]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with_special = Tokenizer.from_str(tokenizer.to_str())
    with_special.add_special_tokens(list(SPECIAL))
    ids = prompt_ids(with_special, "push red", [(1, 4, 2)])
    assert [words[i] for i in ids] == [
        "<|im_start|>",
        "user",
        "push",
        "red",
        "<|vision_start|>",
        "<|image_pad|>",
        "<|image_pad|>",
        "<|vision_end|>",
        "<|im_end|>",
    ]
    padded, mask = pad_prompts([ids, ids[:4]])
    assert padded[1].tolist() == ids[:4] + [0] * 5 and mask[1].tolist() == [True] * 4 + [False] * 5
    with pytest.raises(ValueError, match="no <|vision_start|>"):
        prompt_ids(
            Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), "push red", [(1, 4, 2)]
        )
