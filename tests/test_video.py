"""Videos: what is written decodes to the frames that went in, and a file is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from fusegen import pictures, video
from fusegen.runtime.errors import Error, FileError, RequestError


def frames(count: int, width: int = 32, height: int = 32) -> Iterator[Image.Image]:
    """Frames of one colour each, the left half of another."""
    for i in range(count):
        made = Image.new("RGB", (width, height), (250, 20 * i, 30))
        made.paste((10, 40, 250 - 20 * i), (0, 0, width // 2, height))
        yield made


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((32, 32), None, (256, 256)), ((33, 17), 1, (34, 18)), ((300, 301), None, (300, 302)), ((1, 2), 3, (4, 6))],
)
def test_an_mp4_decodes_to_its_frames(
    size: tuple[int, int], scale: int | None, expected: tuple[int, int], tmp_path: Path
) -> None:
    file = tmp_path / "a.mp4"
    assert video.save(frames(12, *size), file, fps=24, scale=scale, facts={"seeds": [1, 2]}) == 12
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames, float(stream.duration * stream.time_base)) == (24, 12, 0.5)
        assert json.loads(container.metadata["comment"]) == {"seeds": [1, 2]}
    found = decoded(file)
    assert len(found) == 12 and {(f.shape[1], f.shape[0]) for f in found} == {expected}
    if min(size) > 2:  # colours are stored at half the resolution
        for got, wanted in zip(found, frames(12, *size), strict=True):
            for x in (0.25, 0.75):
                there = got[expected[1] // 2, int(expected[0] * x)].astype(int)
                assert np.abs(there - wanted.getpixel((int(size[0] * x), size[1] // 2))).max() <= 6


@pytest.mark.parametrize(("suffix", "fps", "total"), [("gif", 30, 400), ("gif", 50, 240), ("webp", 30, 400)])
def test_animated_pictures_play_at_their_rate(suffix: str, fps: int, total: int, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    assert video.save(frames(12, 9, 5), file, fps=fps, scale=3) == 12
    image = Image.open(file)
    lengths = []
    for frame in ImageSequence.Iterator(image):
        frame.load()
        lengths.append(frame.info["duration"])
    assert image.size == (27, 15) and image.n_frames == 12 and image.info["loop"] == 0
    assert sum(lengths) == total and max(lengths) - min(lengths) <= 10
    for i, frame in enumerate(ImageSequence.Iterator(image)):
        there = frame.convert("RGB").getpixel((24, 7))
        assert np.abs(np.array(there) - (250, 20 * i, 30)).max() <= (6 if suffix == "webp" else 0)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        video.save(frames(5), tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_a_video_is_written_whole_or_not_at_all(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"a.{suffix}"
    video.save(frames(3), file)
    before = file.read_bytes()

    def broken() -> Iterator[Image.Image]:
        yield from frames(4)
        raise Error("the model failed")

    with pytest.raises(Error, match="the model failed"):
        video.save(broken(), file)
    with pytest.raises(RequestError, match="frame 2 is of another size"):
        video.save([*frames(2), *frames(1, 8, 8)], file)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space"):
        video.save(frames(5), file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_what_cannot_be_a_video_is_refused(tmp_path: Path) -> None:
    for name, fps, says in (
        ("a.avi", 30, "does not end in one of .mp4"),
        ("a.mp4", 0, "0 frames a second is out of range"),
        ("a.mp4", 241, "241 frames a second"),
        ("a.gif", 60, "60 frames a second is out of range for .gif .*1 to 50"),
    ):
        with pytest.raises(RequestError, match=says):
            video.save(frames(2), tmp_path / name, fps)
    with pytest.raises(RequestError, match="no frames"):
        video.save([], tmp_path / "a.mp4")
    with pytest.raises(RequestError, match="9600 x 32 pixels is too large"):
        video.save(frames(1, 9600, 32), tmp_path / "a.mp4", scale=1)
    assert os.listdir(tmp_path) == []


def test_tiny_frames_become_watchable() -> None:
    assert [video.enlargement(n, 4 * n) for n in (16, 32, 64, 255, 256, 1024)] == [16, 8, 4, 2, 1, 1]
    assert video.enlargement(32, 32, 3) == 3


def test_an_odd_side_repeats_its_last_pixels() -> None:
    made = Image.new("RGB", (3, 3), "red")
    made.putpixel((2, 2), (0, 0, 255))
    made.putpixel((2, 0), (0, 255, 0))
    even = pictures.even(made)
    assert even.size == (4, 4) and even.crop((0, 0, 3, 3)).tobytes() == made.tobytes()
    assert even.getpixel((3, 3)) == even.getpixel((3, 2)) == even.getpixel((2, 3)) == (0, 0, 255)
    assert even.getpixel((3, 0)) == (0, 255, 0) and even.getpixel((0, 3)) == (255, 0, 0)
    assert pictures.even(even) is even
