"""What the tokenizers of the frozen backbones make of a dataset's instructions, and who says so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import data
from formats.texts import Words
from motus import PRESETS, preset

pytest.importorskip("pyarrow")
pytest.importorskip("av")
from formats.cards import Pyramid
from formats.lerobot import write_v3

TOY = Words.of(PRESETS["toy"])


def notes(*texts: str) -> str:
    return "\n".join(note for words in TOY for note in words.notes(texts))


def write(root, texts, robot="arm"):
    """A dataset with one episode for each text."""
    rng = np.random.default_rng(0)
    pictures = [np.full((48, 48, 3), 40 + i, np.uint8) for i in range(24)]
    episodes = []
    for text in texts:
        numbers = rng.normal(size=(24, 3))
        episodes.append(({"front": pictures}, numbers, numbers, [text] * 24))
    write_v3(root, episodes, 10)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"robot_type": robot}))
    return str(root)


# -- the function ---------------------------------------------------------------------------------


def test_words_that_a_preset_does_not_know_are_named():
    """They are one to it, and so are the sentences that differ in them alone: the network sees the
    same states."""
    texts = ["lift the cup", "fill the cup", "wash the cup"]
    said = notes(*texts)
    for network in ("text encoder", "VLM"):
        assert f"unknown words, all one to the {network}: " in said
        assert "'lift the cup' = 'fill the cup' = 'wash the cup'" in said
    assert all(word in said for word in ("lift", "fill", "wash", "cup"))
    states, _ = data.backbones_of("toy", preset("toy"), parts=("text",)).encode_text(texts)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_the_limit_is_where_the_text_encoder_cuts():
    """A text of text_len - 1 tokens and its end is whole; one more is cut, and says after which
    words."""
    (text, *_) = TOY
    most = preset("toy").video.text_len - 1
    assert text.limit == most
    encoder = data.backbones_of("toy", preset("toy"), parts=("text",))
    start = " ".join(["push", "the", "red", "disc"] * most).split()
    for more in (0, 1):
        sentence = " ".join(start[: most + more])
        cut = "cut for the text encoder" in notes(sentence)
        _, lengths = encoder.encode_text([sentence])
        assert cut == bool(more) and int(lengths) == most + 1
    left, right = (" ".join([*start[:most], side]) for side in ("left", "right"))
    assert "are the same to the text encoder" in notes(left, right)


def test_instructions_of_the_presets_own_world_lose_nothing():
    """Every word of the toy's card is known, none is cut, none is another."""
    pyramid = data.open_pyramid(None, "latent", "toy", episodes=8)
    assert pyramid.words and pyramid.notes() == ""
    assert "warning" not in pyramid.describe()


def test_published_tokenizers_are_read_where_they_lie(tmp_path, monkeypatch):
    """In the layout of the published weights, by the folder that MOTUS_BACKBONES names; where they
    are not, that is said."""
    missing = Words.of(SimpleNamespace(backbones=tmp_path, motus=preset("full")))
    assert [words.tokenizer for words in missing] == [None, None]
    assert all("is not here" in note for words in missing for note in words.notes(["go"]))
    assert not any(words.signs("<|im_end|>") for words in missing)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "go": 1, "<|im_end|>": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|im_end|>"])
    for name in ("wan/google/umt5-xxl", "qwen3vl"):
        (tmp_path / name).mkdir(parents=True)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    monkeypatch.setenv("MOTUS_BACKBONES", str(tmp_path))
    text, vlm = Words.of(PRESETS["full"])
    assert (text.limit, vlm.limit) == (511, None)
    assert list(text.notes(["go"])) == [] and "unknown words" in " ".join(vlm.notes(["stop"]))
    assert text.signs("go <|im_end|>") == vlm.signs("go<|im_end|>now") == ["<|im_end|>"]


# -- who says it ----------------------------------------------------------------------------------

LONG = "push the red disc to the left and then push the blue disc to the right and then to the "
TEXTS = {
    "unknown words": ["lift the cup", "fill the cup"],
    "cut for the text encoder": [LONG + "left", LONG + "right"],
    "are the same to the": ["lift the cup", "fill the cup"],
}


@pytest.mark.parametrize("words", TEXTS)
def test_check_inspect_and_describe_say_it(words, tmp_path, monkeypatch, capsys):
    """The same lines from all three; train prints what `describe` says. It is no fault: a run goes
    on."""
    monkeypatch.chdir(tmp_path)
    root = write(tmp_path / "set", TEXTS[words] * 2)
    data.main(["check", root])
    checked = capsys.readouterr().out
    data.main(["inspect", root])
    inspected = capsys.readouterr().out
    described = data.open_pyramid(root, "3", "toy").describe()
    assert "no fault found" in checked and "no fault found" in inspected
    for said in (checked, inspected, described):
        assert any(words in line for line in said.splitlines() if line.startswith("warning  "))


@pytest.mark.parametrize("sign", ["<|image_pad|>", "<|im_end|>", "</s>"])
@pytest.mark.parametrize("where", ["task", "prefix", "instruction"])
def test_a_sign_of_the_backbones_in_an_instruction_is_refused_with_its_text(sign, where, tmp_path):
    """Before anything is encoded, by any command; another instruction in the card cures it."""
    text = f"press {sign} now"
    root = write(tmp_path / "set", [text if where == "task" else "push the red disc"] * 2)
    mapping = {} if where == "task" else {where: text}
    card = {"sources": [{"path": root, "mapping": mapping}]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    for use in (
        lambda: data.main(["check", str(tmp_path / "card.json")]),
        lambda: data.open_pyramid(tmp_path / "card.json", "3", "toy"),
    ):
        with pytest.raises(
            ValueError, match="source .*press <.* now.* holds .*mapping.instruction"
        ):
            use()
    card["sources"][0]["mapping"] = {"instruction": "push the red disc"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert data.open_pyramid(tmp_path / "card.json", "3", "toy").check() == []


def test_an_empty_instruction_is_a_fault_of_check_with_its_cure(tmp_path):
    """Training goes on without words; the cure that is named works as written."""
    root = write(tmp_path / "set", ["push the red disc", "", ""])
    (fault,) = Pyramid(root, (6,), 4, (48, 48)).check()
    assert "instruction: is empty in episodes [1, 2], 2 in all" in fault
    cure = fault[fault.index('"mapping"') : fault.index(" in the card")].replace("...", "go")
    card = {"sources": [{"path": root} | json.loads("{" + cure + "}")]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert Pyramid(tmp_path / "card.json", (6,), 4, (48, 48)).check() == []


# -- robots ---------------------------------------------------------------------------------------


def robots_of(tmp_path, *kinds, names=None, embodiments=None, folders=("degrees", "radians")):
    """The robots of a card of two datasets, whose files say these `robot_type`s and `names`."""
    sources = []
    for i, (folder, kind) in enumerate(zip(folders, kinds, strict=True)):
        write(tmp_path / folder, ["push"] * 2, kind)
        path = tmp_path / folder / "meta/info.json"
        info = json.loads(path.read_text())
        if names:
            info["features"]["action"]["names"] = names[i]
        path.write_text(json.dumps(info))
        sources.append({"path": folder, "embodiment": embodiments[i] if embodiments else ""})
    (tmp_path / "card.json").write_text(json.dumps({"sources": sources}))
    pyramid = Pyramid(tmp_path / "card.json", (6,), 4, (48, 48))
    return [robot.embodiment for robot in pyramid.robots(True)]


@pytest.mark.parametrize("kind", ["unknown", "Unknown", " ", None, "none"])
def test_files_that_name_no_robot_are_not_of_one(tmp_path, kind):
    """Each is a robot of its own, by its folder, unless the card says otherwise."""
    assert robots_of(tmp_path, kind, kind) == ["degrees", "radians"]


def test_files_that_name_a_robot_share_it(tmp_path):
    assert robots_of(tmp_path, "so100", "so100") == ["so100"]


def test_a_card_may_say_that_files_are_of_one_robot(tmp_path):
    assert robots_of(tmp_path, "unknown", "unknown", embodiments=["arm", "arm"]) == ["arm"]


NAMES = [["a.deg", "b.deg", "grip"], ["a.rad", "b.rad", "grip"]]


def test_numbers_of_other_names_are_not_pooled_silently(tmp_path):
    """Refused with both lists; a card that names the robots decides."""
    with pytest.raises(ValueError, match="degrees and radians are of robot 'so100'.*a.deg.*a.rad"):
        robots_of(tmp_path / "a", "so100", "so100", names=NAMES)
    for i, pair in enumerate((["x", "x"], ["x", "y"])):
        found = robots_of(tmp_path / f"b{i}", "so100", "so100", names=NAMES, embodiments=pair)
        assert found == sorted(set(pair))
    same = [["a", "b", "c"], {"motors": ["a", "b", "c"]}]
    assert robots_of(tmp_path / "c", "so100", "so100", names=same) == ["so100"]


def test_folders_alike_are_no_robot_either(tmp_path):
    """Two folders `data` that name no robot: the card must."""
    folders = ("one/data", "two/data")
    with pytest.raises(ValueError, match="one/data and two/data are of robot 'data'.*embodiment"):
        robots_of(tmp_path / "a", "unknown", None, folders=folders)
    pair = ["arm", "leg"]
    assert robots_of(tmp_path / "b", None, None, folders=folders, embodiments=pair) == pair
