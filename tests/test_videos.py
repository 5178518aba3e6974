"""Pictures out of mp4 files, as a player shows them: every row alone, whatever wrote the file."""

import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
from lerobot_files import SINGLE, as_v21  # noqa: E402

from formats.lerobot import LeRobotDataset, write_v3  # noqa: E402
from formats.recordings import Storage, VideoReader, VideoWriter, turned  # noqa: E402
from formats.videos import VideoFolder  # noqa: E402

CAMERA = "observation.images.front"
SIZE = (64, 96)
ROWS = 24


def film(count: int = ROWS, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Pictures that tell their row by the place of a bright bar; the top is white."""
    pages = np.full((count, *size, 3), 40, np.uint8)
    for i, page in enumerate(pages):
        page[: size[0] // 4] = 255
        page[size[0] // 2 :, 3 * i + 3 : 3 * i + 9] = 250
    return list(pages)


def shown_by(path: Path, count: int = ROWS) -> list[np.ndarray]:
    """The pictures of a file without a table, at 10 fps."""
    video = VideoReader(path, alone=True)
    return list(video.read(video.start * video.tick + i / 10 for i in range(count)))


def row_of(picture: np.ndarray) -> int:
    return round((int(np.argmax(picture[-8, :, 0] > 150)) - 3) / 3)


def encode(path: Path, codec: str = "libx264", options=None, pix="yuv420p", **more) -> Path:
    """An mp4 at 10 fps. more: size, first (number of the first picture), muxer, times of all."""
    size = more.get("size", SIZE)
    times = more.get("times", [i + more.get("first", 0) for i in range(ROWS)])
    with av.open(str(path), "w", options=more.get("muxer", {})) as out:
        if more.get("sound"):
            sound = out.add_stream("aac", rate=8000)
        stream = out.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix
        if more.get("aspect"):
            stream.codec_context.sample_aspect_ratio = more["aspect"]
        for time, page in zip(times, film(len(times), size)):
            frame = av.VideoFrame.from_ndarray(page, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if more.get("sound"):
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            quiet.sample_rate, quiet.pts = 8000, 0
            out.mux(sound.encode(quiet))
            out.mux(sound.encode(None))
    return path


def encode_apart(path: Path, **more) -> Path:
    """In a process of its own: x265 in PyAV's wheels now and then crashes while it encodes."""
    code = f"import json, sys\nfrom test_videos import *\nencode(Path(sys.argv[1]), **{more!r})"
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    for _ in range(5):
        path.unlink(missing_ok=True)
        run = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True)
        if not run.returncode:
            return path
    pytest.skip("x265 does not encode here")


def edited(path: Path, skip: int) -> Path:
    """The first `skip` pictures are left out by the file's edit list, as a cut without encoding
    leaves them."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"elst") + 12
    with av.open(str(path)) as video:
        ticks = round(1 / video.streams.video[0].time_base) // 10
    _, begin = struct.unpack(">Ii", raw[at : at + 8])
    struct.pack_into(">Ii", raw, at, 100 * (ROWS - skip), begin + skip * ticks)
    path.write_bytes(raw)
    return path


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """The display matrix of a file, in units."""
    raw = bytearray(path.read_bytes())
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = raw.index(plain, raw.index(b"tkhd"))
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    raw[at : at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(raw)
    return path


KINDS = {
    "as LeRobot writes h264": dict(options={"g": "2", "crf": "30"}),
    "defaults of x264": {},
    "three B-frames": dict(options={"bf": "3", "g": "12"}),
    "open GOP of h264": dict(options={"bf": "3", "g": "6", "x264-params": "open-gop=1"}),
    "AV1": dict(codec="libsvtav1", options={"g": "4", "preset": "12"}),
    "VP9": dict(codec="libvpx-vp9", options={"g": "6", "cpu-used": "8", "deadline": "realtime"}),
    "no edit list, so that it begins late": dict(options={"bf": "3"}, muxer={"use_editlist": "0"}),
    "a first picture at 0.7 s": dict(first=7),
    "sound first": dict(sound=True),
    "odd sides": dict(pix="yuv444p", size=(61, 93)),
    "grey": dict(pix="gray"),
    "4:2:2 of 10 bits": dict(pix="yuv422p10le"),
    "rgb": dict(codec="libx264rgb", pix="rgb24"),
}
APART = {
    "as LeRobot writes hevc": dict(codec="libx265", options={"g": "2", "crf": "30"}),
    "hevc with an open GOP": dict(codec="libx265", options={"g": "10", "crf": "20"}),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A v2.1 dataset of one episode, whose mp4 is to be replaced."""
    root = tmp_path_factory.mktemp("table") / "set"
    rows = np.random.default_rng(0).normal(size=(ROWS, 2))
    write_v3(root, [({"front": film()}, rows, rows, "go")], 10, SINGLE)
    as_v21(root)
    return root


def dataset(table: Path, size=SIZE) -> tuple[Path, LeRobotDataset]:
    info = json.loads((table / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [*size, 3]
    (table / "meta/info.json").write_text(json.dumps(info))
    return next(table.resolve().rglob("*.mp4")), LeRobotDataset(table)


@pytest.mark.parametrize("kind", [*KINDS, *APART])
def test_every_row_comes_back_alone_and_in_order(table, kind):
    """A fresh reader for each row, one for all in a row, leaps and steps back: the same pictures;
    `check` finds nothing."""
    more = KINDS.get(kind) or APART.get(kind, {})
    path, reader = dataset(table, more.get("size", SIZE))
    (encode_apart if kind in APART else encode)(path, **more)
    for row in np.random.default_rng(0).permutation(ROWS).tolist():
        alone = LeRobotDataset(table)
        assert row_of(next(alone.pictures(0, CAMERA, [row]))) == row, (kind, row)
        assert row_of(next(reader.pictures(0, CAMERA, [row]))) == row, (kind, row)
    assert list(map(row_of, reader.pictures(0, CAMERA, range(ROWS)))) == list(range(ROWS))
    assert list(map(row_of, reader.pictures(0, CAMERA, range(0, ROWS, 5)))) == [0, 5, 10, 15, 20]
    assert reader.check() == []
    alike = zip(shown_by(path), reader.pictures(0, CAMERA, range(ROWS)), strict=True)
    assert all(np.array_equal(a, b) for a, b in alike)


def test_a_file_that_begins_late_is_read_among_others_too(tmp_path):
    """In v3.0 three episodes share a file; rows are counted from its first picture, unless the
    table counts from where the file does."""
    lengths = [8, 8, 8]
    episodes = [({"front": film()[8 * e :][:n]}, None, None, "go") for e, n in enumerate(lengths)]
    write_v3(tmp_path / "set", episodes, 10)
    path = next((tmp_path / "set").resolve().rglob("*.mp4"))
    encode(path, first=7)
    reader = LeRobotDataset(tmp_path / "set")
    for e in range(3):
        assert [row_of(p) for p in reader.pictures(e, CAMERA, [2, 5])] == [8 * e + 2, 8 * e + 5]
    pq = pytest.importorskip("pyarrow.parquet")
    rows = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    found = pq.read_table(rows)
    for name in ("from_timestamp", "to_timestamp"):
        name = f"videos/{CAMERA}/{name}"
        later = [value + 0.7 for value in found[name].to_pylist()]
        found = found.set_column(found.column_names.index(name), name, [later])
    pq.write_table(found, rows)
    reader = LeRobotDataset(tmp_path / "set")
    assert [row_of(p) for p in reader.pictures(2, CAMERA, [2, 5])] == [18, 21]
    assert reader.check() == []


def test_pictures_that_an_edit_list_leaves_out_are_no_rows(tmp_path):
    """A cut without encoding keeps pictures that nobody sees: row 0 is the first that is shown."""
    rows = np.random.default_rng(0).normal(size=(ROWS - 5, 2))
    write_v3(tmp_path / "set", [({"front": film()[5:]}, rows, rows, "go")], 10, SINGLE)
    as_v21(tmp_path / "set")
    path, reader = dataset(tmp_path / "set")
    edited(encode(path), 5)
    assert [row_of(p) for p in reader.pictures(0, CAMERA, [0, 9, 18])] == [5, 14, 23]
    assert reader.check() == []
    plain = VideoFolder(path.parent)
    assert plain.lengths.tolist() == [ROWS - 5] and row_of(shown_by(path, 1)[0]) == 5


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1),
                                    (-1, 0, 0, 1), (0, 1, 1, 0)])  # fmt: skip
def test_pictures_are_turned_as_a_player_turns_them(tmp_path, table, matrix):
    """Quarters of a turn and mirrors: where a place of the stored picture goes is what the matrix
    says, in datasets and in videos alone."""
    path = with_matrix(encode(tmp_path / "phone.mp4"), *matrix)
    a, b, c, d = matrix
    (stored,) = (film()[4],)
    shown = next(VideoReader(path).read([0.4]))
    height, width = shown.shape[:2]
    for y, x in ((4, 48), (60, 18), (60, 4)):  # white top, the bar, dark
        to_x, to_y = a * x + c * y, b * x + d * y
        there = shown[to_y % height, to_x % width].mean()
        assert abs(there - stored[y, x].mean()) < 30, (matrix, y, x)
    assert np.array_equal(list(VideoFolder(tmp_path).pictures(0, "video", range(ROWS)))[4], shown)
    mp4, reader = dataset(table, (height, width))
    mp4.write_bytes(path.read_bytes())
    assert np.array_equal(next(reader.pictures(0, CAMERA, [4])), shown)
    assert reader.check() == []


def test_a_turn_that_info_json_does_not_know_is_named(table):
    """A sideways picture is no upright one: the error says both sizes."""
    path, reader = dataset(table)
    with_matrix(encode(path), 0, 1, -1, 0)
    with pytest.raises(
        ValueError, match="is 96 x 64 .*, expected 64 x 96 .*turned by its metadata"
    ):
        next(reader.pictures(0, CAMERA, [3]))
    with pytest.raises(ValueError, match="expected quarters of a turn"):
        turned(np.zeros((4, 4, 3), np.uint8), np.array([[1, 1], [-1, 1]]))


@pytest.mark.parametrize("space, span", [(None, None), (1, 1), (1, 2), (5, 2)])
def test_colours_are_those_that_the_file_states(tmp_path, space, span):
    """BT.601 and BT.709, full range and the television's: within 4 of 255."""
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (90, 160, 220)]
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        if space:
            context = stream.codec_context
            context.colorspace, context.color_range = space, span
        for colour in colours:
            page = np.full((32, 48, 3), colour, np.uint8)
            frame = av.VideoFrame.from_ndarray(page, format="rgb24")
            if space:
                to = dict(dst_colorspace=space, dst_color_range=span)
                frame = frame.reformat(format="yuv444p", **to)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    seen = shown_by(tmp_path / "a.mp4", len(colours))
    for picture, colour in zip(seen, colours, strict=True):
        assert np.abs(picture[16, 24].astype(int) - colour).max() <= 4


def test_videos_alone_have_square_pixels_and_any_rate(tmp_path, table):
    """Pixels twice as wide as high are drawn so; in a dataset info.json says what a picture is.
    Where the rate varies a row has the picture that a player shows at its time, in any order."""
    path = encode(tmp_path / "wide.mp4", aspect=Fraction(2, 1))
    assert shown_by(path, 1)[0].shape == (64, 192, 3)
    mp4, reader = dataset(table)
    mp4.write_bytes(path.read_bytes())
    assert next(reader.pictures(0, CAMERA, [0])).shape == (*SIZE, 3)
    late = [i + 5 * (i > 9) for i in range(ROWS)]
    shown = [*range(10), *5 * [9], *range(10, ROWS)]
    encode(path, times=late, options={"g": "6", "bf": "2"})
    assert list(map(row_of, shown_by(path, len(shown)))) == shown
    reader = VideoReader(path, alone=True)
    for time in np.random.default_rng(0).permutation(len(shown)).tolist():
        (picture,) = reader.read([reader.start * reader.tick + time / 10 + 0.04])
        assert row_of(picture) == shown[time], time
    with pytest.raises(ValueError, match="has a frame at 1.5.* but none at 1.1"):
        next(VideoReader(path).read([1.1]))


def test_check_reads_rows_alone(table, monkeypatch):
    """A reader that gives another picture when it leaps than when it goes on is found out."""
    path, reader = dataset(table)
    encode(path)
    right = LeRobotDataset.pictures

    def leaping(self, episode, camera, rows):
        for picture in right(self, episode, camera, rows):
            yield picture if len(rows) > 1 else picture // 2

    assert reader.check() == []
    monkeypatch.setattr(LeRobotDataset, "pictures", leaping)
    assert "another picture alone than in order" in "\n".join(reader.check())


def test_a_cover_is_no_camera_and_sound_no_video(tmp_path):
    """The picture that a phone or a shop attaches to a file is not what it films."""
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        cover = out.add_stream("mjpeg", rate=10)
        stream = out.add_stream("libx264", rate=10)
        cover.disposition = av.stream.Disposition.attached_pic
        for one, pix in ((cover, "yuvj420p"), (stream, "yuv420p")):
            one.height, one.width, one.pix_fmt = *SIZE, pix
        out.mux(cover.encode(av.VideoFrame.from_ndarray(film()[9], format="rgb24")))
        for page in film():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
        out.mux(cover.encode(None))
        out.mux(stream.encode(None))
    assert list(map(row_of, shown_by(tmp_path / "a.mp4"))) == list(range(ROWS))
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=8000)
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        quiet.sample_rate, quiet.pts = 8000, 0
        out.mux(sound.encode(quiet))
        out.mux(sound.encode(None))
    with pytest.raises(ValueError, match="has no video stream"):
        VideoReader(tmp_path / "sound.mp4")


def test_the_writer_and_the_reader_agree_on_times(tmp_path):
    """29.97 fps: 300 pictures in 10.01 s, the last where i / fps says."""
    writer = VideoWriter(tmp_path / "a.mp4", 29.97, (16, 96), Storage())
    pages = film(30, (16, 96))
    for i in range(300):
        writer.add(pages[i % 30], i == 0)
    writer.close()
    seen = list(VideoReader(tmp_path / "a.mp4", (16, 96)).read([7 / 29.97, 299 / 29.97]))
    assert [row_of(p) for p in seen] == [7, 29]
