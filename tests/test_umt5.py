"""The UMT5 encoder against the official code (golden tensors) and transformers, and the tokenizer
around it."""

import builtins
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backbones.frozen import Backbones
from backbones.umt5 import (
    T5Tokenizer,
    UMT5Config,
    UMT5Encoder,
    clean,
    relative_buckets,
)
from weights.files import TensorSource
from weights.layouts import rename_from
from weights.load import load_into

GOLDEN = Path(__file__).parent / "golden"
rename = rename_from("umt5-transformers")
TINY = UMT5Config(vocab=64, dim=32, dim_attn=48, dim_ffn=40, heads=4, layers=2)

# heads, an odd head size, a bucket table that is not the default, and lengths beyond max_distance
# all occur.
CONFIGS = (
    UMT5Config(vocab=80, dim=32, dim_attn=32, dim_ffn=64, heads=4, layers=2),
    UMT5Config(
        vocab=50, dim=20, dim_attn=21, dim_ffn=33, heads=3, layers=3, buckets=16, max_distance=20
    ),
    UMT5Config(
        vocab=33, dim=48, dim_attn=64, dim_ffn=24, heads=8, layers=1, buckets=32, max_distance=64
    ),
)
LENGTHS = ([11, 7, 1], [45, 30], [150])


def oracle_and_ours(config: UMT5Config):
    """A transformers encoder with random weights far from zero, and ours with the same weights
    through the key table."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    oracle = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=config.vocab,
            d_model=config.dim,
            d_kv=config.dim_attn // config.heads,
            d_ff=config.dim_ffn,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            is_encoder_decoder=False,
            use_cache=False,
        )
    ).eval()
    with torch.no_grad():
        for weight in oracle.parameters():
            weight.copy_(
                torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.3)
                + (weight.dim() == 1)
            )
    ours = UMT5Encoder(config)
    ours.load_state_dict(
        {rename(name): weight for name, weight in oracle.state_dict().items() if rename(name)}
    )
    return oracle, ours


def inputs(config: UMT5Config, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(config.vocab, (len(lengths), max(lengths)))
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.float() - y.float()).abs().max() / y.float().abs().max()).item()


def test_encoder_reproduces_the_official_code():
    """The states of the official encoder come out of the official weights under their own names,
    within 1e-5."""
    sizes = json.loads((GOLDEN / "umt5.json").read_text())
    assert (sizes["num_heads"], sizes["num_layers"], sizes["dim_attn"]) == (
        TINY.heads,
        TINY.layers,
        TINY.dim_attn,
    )
    model = UMT5Encoder(TINY)
    model.load_state_dict(torch.load(GOLDEN / "umt5.pth", weights_only=True))
    golden = load_file(GOLDEN / "umt5.safetensors")
    assert error(model(golden["ids"], golden["mask"]), golden["hidden"]) < 1e-5


@pytest.mark.parametrize("config, lengths", list(zip(CONFIGS, LENGTHS)))
@torch.no_grad()
def test_encoder_equals_transformers_in_fp32_and_rounds_no_worse_in_bf16(config, lengths):
    """fp32 within 1e-5 of transformers; in bf16 no further from its fp32 states than transformers'
    own bf16 run."""
    oracle, ours = oracle_and_ours(config)
    ids, mask = inputs(config, lengths)
    expected = oracle(ids, attention_mask=mask.long()).last_hidden_state[mask]
    assert error(ours(ids, mask)[mask], expected) < 1e-5
    rounded = oracle.bfloat16()(ids, attention_mask=mask.long()).last_hidden_state[mask]
    states = ours.bfloat16()(ids, mask)[mask]
    rms = [(x.float() - expected).square().mean().sqrt() for x in (states, rounded)]
    assert (
        states.dtype == torch.bfloat16 and rms[0] < 1.2 * rms[1]
    )  # two roundings agree in size to about a tenth


@torch.no_grad()
def test_padding_neither_changes_real_rows_nor_leaks_out():
    """A text encoded alone equals its rows in a padded batch, and padded rows are exactly zero,
    also where nothing is real."""
    torch.manual_seed(0)
    model = UMT5Encoder(TINY)
    ids, mask = inputs(TINY, [9, 4, 0])
    states = model(ids, mask)
    assert error(model(ids[1:2, :4], mask[1:2, :4]), states[1:2, :4]) < 1e-5
    assert states.isfinite().all() and not states[~mask].any()


def test_relative_buckets_match_control_values():
    """Offsets key - query fall into the buckets that the official formula gives."""
    expected = {
        -300: 15,
        -128: 15,
        -127: 15,
        -64: 14,
        -16: 10,
        -8: 8,
        -7: 7,
        -1: 1,
        0: 0,
        1: 17,
        7: 23,
        8: 24,
        11: 24,
        12: 25,
        16: 26,
        32: 28,
        64: 30,
        127: 31,
        500: 31,
    }
    buckets = relative_buckets(600, 32, 128)
    assert {
        offset: int(buckets[-offset, 0] if offset < 0 else buckets[0, offset])
        for offset in expected
    } == expected


def test_full_size_has_the_published_parameters_and_names():
    """UMT5-XXL counts 5,680,910,336 parameters in 242 tensors, which are exactly the translated
    transformers names."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = UMT5Encoder(UMT5Config())
        oracle = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=256384,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
    shapes = {name: tuple(weight.shape) for name, weight in ours.state_dict().items()}
    assert (sum(weight.numel() for weight in ours.parameters()), len(shapes)) == (
        5_680_910_336,
        242,
    )
    renamed = {rename(name): tuple(weight.shape) for name, weight in oracle.state_dict().items()}
    renamed.pop(None, None)  # the second name of the token embedding
    assert renamed == shapes


def test_a_decoder_is_refused_by_name():
    """A whole T5 is no text encoder: what has no place in ours is an error that names it."""
    ours = UMT5Encoder(TINY)
    tensors = ours.state_dict() | {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}
    source = TensorSource(Path("t5"), tensors, {}, frozenset())
    with pytest.raises(ValueError, match="unexpected: decoder.block.0"):
        load_into(ours, source, rename)


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    """A word-level stand-in for the published tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "pick", "up", "the", "red", "cube"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_ends_truncates_and_pads(tokenizer_file):
    """Every text ends in `</s>`, is cut so that `</s>` is the last of text_len, and padded to the
    longest."""
    ids, mask = T5Tokenizer(tokenizer_file, text_len=5).encode(
        ["pick up  the\nred cube", "red", ""]
    )
    assert ids.tolist() == [[3, 4, 5, 6, 1], [6, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [5, 2, 1]


def test_tokenizer_says_what_is_missing(tokenizer_file):
    """A missing file and a file without the T5 tokens are named."""
    with pytest.raises(ValueError, match="nowhere.json does not exist"):
        T5Tokenizer("nowhere.json")
    tokenizer_file.write_text(tokenizer_file.read_text().replace("</s>", "<end>"))
    with pytest.raises(ValueError, match="has no token '</s>'"):
        T5Tokenizer(tokenizer_file)


def test_encode_text_gives_zero_padded_context_and_lengths(tokenizer_file):
    """Context rows beyond a text's length are zero; the length counts `</s>`."""
    torch.manual_seed(0)
    backbones = Backbones(text=(UMT5Encoder(TINY), T5Tokenizer(tokenizer_file)))
    context, lengths = backbones.encode_text(["red cube", "pick up the red cube"])
    assert context.shape == (2, 6, 32) and lengths.tolist() == [3, 6]
    assert (
        context[0, 3:].abs().sum() == 0
        and context[0, :3].abs().sum() > 0
        and not context.requires_grad
    )


def test_cleaning_repairs_text_and_resolves_entities():
    """ftfy mends wrongly decoded letters and straightens quotes; entities written twice over are
    resolved."""
    pytest.importorskip("ftfy")
    assert (
        clean("&amp;lt; the cup\u2019s lid \u00e2\u20ac\u201d now") == "< the cup's lid \u2014 now"
    )


def test_cleaning_asks_for_ftfy_only_where_it_matters(monkeypatch):
    """Whitespace collapses and plain ASCII stays; anything else needs ftfy, and a missing ftfy is
    named with the remedy."""
    assert clean("  put\t the  red\r\n cube  (slowly)! ") == "put the red cube (slowly)!"
    real_import = builtins.__import__

    def without_ftfy(name, *args, **kwargs):
        if name == "ftfy":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ftfy)
    assert clean("put the red cube") == "put the red cube"
    with pytest.raises(ImportError, match="pip install ftfy"):
        clean("caf\u00e9")
