"""Frames to a video file: H.264 in MP4, or an animated GIF or WebP; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fusegen import pictures
from fusegen.runtime import write
from fusegen.runtime.errors import FileError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = (".mp4", ".gif", ".webp")
WATCHABLE, MOST_SIDE = 256, 8192  # pixels a side
RATE, MOST_RATE = 30, 240  # frames a second
GIF_RATE = 50  # browsers play a frame of less than two hundredths of a second as if it had ten
QUALITY = "16"  # x264's constant rate factor: 0 is lossless, 23 its default


def enlargement(width: int, height: int, scale: int | None = None) -> int:
    """By how much frames are enlarged: ``scale``, or the least that makes both sides ``WATCHABLE``.

    Raises RequestError where the video would be too large.
    """
    times = -(-WATCHABLE // min(width, height, WATCHABLE)) if scale is None else scale
    if max(width, height) * times > MOST_SIDE:
        what = f"a video of {width * times} x {height * times} pixels is too large"
        raise RequestError(what, "scale", f"its sides may be {MOST_SIDE}")
    return times


def check(path: Path, fps: int) -> None:
    """Raise RequestError for a suffix that is no video's, or a rate that the format does not have."""
    kind, most = path.suffix.lower(), MOST_RATE
    if kind not in FORMATS:
        raise RequestError(f"'{path}' does not end in one of {', '.join(FORMATS)}", "-o")
    if kind == ".gif":
        most = GIF_RATE
    if not 1 <= fps <= most:
        raise RequestError(f"{fps} frames a second is out of range for {kind}", "fps", f"it is 1 to {most}")


def save(
    frames: Iterable[Image],
    path: str | Path,
    fps: int = RATE,
    scale: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Write ``frames``, all of one size, as they come; returns how many there were.

    Pixels become squares of ``scale`` (:func:`enlargement`).  ``facts`` go into an MP4's comment as JSON.  What raises
    while frames are drawn leaves no file.
    """
    path = Path(path)
    check(path, fps)
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise RequestError("there are no frames", "video")
    times = enlargement(first.width, first.height, scale)
    enlarged = (pictures.enlarged(f, times) for f in _alike(first, chain([first], rest)))
    with write.atomic(path) as file:
        return WRITERS[path.suffix.lower()](enlarged, file, fps, facts or {})


def _alike(first: Image, frames: Iterable[Image]) -> Iterator[Image]:
    for i, frame in enumerate(frames):
        if frame.size != first.size:
            sizes = f"it is {frame.width} x {frame.height}, the first {first.width} x {first.height}"
            raise RequestError(f"frame {i} is of another size", "video", sizes)
        yield frame.convert("RGB")


def _mp4(frames: Iterator[Image], file: BinaryIO, fps: int, facts: Mapping[str, Any]) -> int:
    """H.264 in YUV 4:2:0 of BT.709, which plays everywhere.  Its sides are even: an odd one repeats its last pixels."""
    import av

    count = 0
    try:
        with av.open(file, "w", format="mp4") as container:
            container.metadata["comment"] = json.dumps(facts)
            stream = container.add_stream("h264", rate=Fraction(fps), options={"crf": QUALITY})
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1  # the same bytes on every machine
            stream.codec_context.colorspace = stream.codec_context.color_primaries = 1
            stream.codec_context.color_trc = stream.codec_context.color_range = 1
            for image in frames:
                picture = av.VideoFrame.from_image(pictures.even(image))
                if not count:
                    stream.width, stream.height = picture.width, picture.height
                picture = picture.reformat(format="yuv420p", dst_colorspace="itu709")
                picture.pts, count = count, count + 1
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise FileError(f"the video cannot be encoded: {error}", file.name) from None
    return count


def _pillow(kind: str, tick: int, **options: Any) -> Callable[..., int]:
    """A writer of a format of Pillow's, whose durations are multiples of ``tick`` milliseconds."""

    def write_frames(frames: Iterator[Image], file: BinaryIO, fps: int, facts: Mapping[str, Any]) -> int:
        first, *rest = frames
        ends = [round(i * 1000 / fps / tick) * tick for i in range(len(rest) + 2)]
        lengths: Sequence[int] = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        first.save(file, kind, save_all=True, append_images=rest, duration=lengths, loop=0, **options)
        return len(lengths)

    return write_frames


WRITERS: Mapping[str, Callable[..., int]] = {
    ".mp4": _mp4,
    ".gif": _pillow("GIF", 10),
    ".webp": _pillow("WEBP", 1, quality=95),
}
