"""Text generation: a decoder-only transformer that goes on from a prompt, or fills in the middle of a text.

The bundle of this family (``manifest.family == "text-generation"``) has the component ``decoder``, with the inputs
``tokens`` (B, n) int64, ``positions`` (B,) int64, ``last`` (B,) int64 and the caches that it writes in place, and the
output logits (B, V) of row ``last`` (``runtime/loop/decode.py``); and the files ``tokenizer.json`` (byte-level) and
``card.md``.  ``manifest.loop`` is a ``TextConfig``, ``manifest.sampler`` the defaults of a request (a
``TextDefaults``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusegen.models import bundled
from fusegen.models.request import config
from fusegen.models.text import TextStream, token_bytes
from fusegen.models.text_request import MOST_PROMPTS, MOST_STOPS, SETTINGS, TextConfig, TextDefaults, texts
from fusegen.runtime import noise
from fusegen.runtime.bundle import Bundle
from fusegen.runtime.compile import AUTO
from fusegen.runtime.compile import compile as compile_program
from fusegen.runtime.engine import Session
from fusegen.runtime.errors import Cancelled, FileError, RequestError
from fusegen.runtime.loop.cancel import Cancel, asked
from fusegen.runtime.loop.decode import Continuation, Decoder, Running, with_sampler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FAMILY = "text-generation"
INPUTS = ("tokens", "positions", "last")
BATCH = 16  # the most texts written at once; a request for more is cut

Progress = Callable[[int, int], object]


class TextGeneration:
    """A text model, ready to :meth:`stream` and :meth:`generate`.

    ``decoder``: the session, compiled so that a text does not depend on those it is made with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        decoder: Session,
        text: TextConfig,
        defaults: TextDefaults,
        bundle: Bundle | None = None,
    ):
        self.tokenizer, self.decoder, self.text, self.defaults = tokenizer, decoder, text, defaults
        self.bundle = bundle
        self.tokenizer.encode_special_tokens = True  # a prompt that spells one means its letters
        self.bytes = token_bytes(tokenizer)
        self.special = self._special()
        self._longer = dict[int, list[int]]()
        forbidden = [i for name, i in self.special.items() if name not in ("end", "begin")]
        unused = range(len(self.bytes), decoder.program.inputs["allowed"].shape[0])  # type: ignore[arg-type]
        self.loop = Decoder(decoder, text.context, [*forbidden, *unused], [self.special["end"]])

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: str = "cpu",
        dtype: torch.dtype | str | None = None,
        deterministic: bool = True,
        without: Collection[str] = (),
        cache: str | Path | None = None,
    ) -> TextGeneration:
        """Open the model in ``bundle``; ``dtype`` None is :func:`~fusegen.runtime.compile.default_dtype`.

        It is compiled deterministic either way: a token that another batch rounds otherwise changes all after it.
        Raises FileError where the bundle's manifest, program or tokenizer is not this family's.
        """
        manifest, where = bundle.manifest, str(bundle.path)
        try:
            text, defaults = config(TextConfig, manifest.loop), config(TextDefaults, manifest.sampler)
        except RequestError as error:
            raise FileError(f"the manifest is not one of a {FAMILY} model: {error}", where) from None
        if "decoder" not in manifest.components:
            raise FileError("the bundle has no component 'decoder'", where, f"a {FAMILY} model needs it")
        program = bundle.program("decoder")
        if tuple(program.inputs)[: len(INPUTS)] != INPUTS or len(program.outputs) != 1:
            wanted = f"it must take {', '.join(INPUTS)} and caches, and give logits"
            raise FileError(f"the decoder takes {', '.join(program.inputs)}", where, wanted)
        chosen = AUTO if dtype is None else dtype
        session = compile_program(
            with_sampler(program, text.context), device, chosen, None, True, without=without, cache=cache
        )
        return cls(bundled.tokenizer(bundle), session, text, defaults, bundle)

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self.decoder.backend.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: that of its caches."""
        return self.decoder.program.inputs[next(iter(self.decoder.state))].dtype

    def settings(self, **given: Any) -> dict[str, Any]:
        """The settings of a request, this model's own where None, checked."""
        for name in given:
            if name not in SETTINGS:
                raise RequestError(f"there is no setting {name!r}", mend=f"there are {', '.join(SETTINGS)}")
        return asdict(replace(self.defaults, **{k: v for k, v in given.items() if v is not None}))

    def stream(
        self,
        prompt: str,
        suffix: str | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        cancel: Cancel | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """What comes after ``prompt``, or between it and ``suffix``, in pieces as they are made.

        ``settings``: those of :class:`~fusegen.models.text_request.TextDefaults`, say ``max_tokens=64,
        temperature=0.8, top_p=0.95``.  ``stop``: the text ends before the first of these.  ``cancel``: an event or a
        function, asked before every token.  A text depends on its own request alone.  The request is checked at once;
        raises :class:`RequestError` or :class:`~fusegen.runtime.errors.Cancelled`.
        """
        requests, stops = self._requests([prompt], [suffix], [seed], stop, settings)
        return (piece for _, piece in self._write(requests, stops, cancel, None))

    def generate(
        self,
        prompts: str | Sequence[str],
        suffix: str | Sequence[str] | None = None,
        seeds: Sequence[int] = (0,),
        stop: str | Sequence[str] = (),
        progress: Progress | None = None,
        cancel: Cancel | None = None,
        **settings: Any,
    ) -> list[str]:
        """What comes after each prompt (before its suffix, where there is one), as :meth:`stream` would give it.

        One prompt or one seed serves all of the others; else there are as many of each.
        ``progress(done, total)`` counts tokens.
        """
        given = texts("prompts", prompts, MOST_PROMPTS)
        count = max(len(given), len(noise.check_seeds(seeds)))
        after: Sequence[str | None] = [None] if suffix is None else texts("suffix", suffix, MOST_PROMPTS)
        prompts, keys = _spread("prompts", given, count), _spread("seeds", seeds, count)
        requests, stops = self._requests(prompts, _spread("suffix", after, count), keys, stop, settings)
        out = [""] * len(requests)
        for row, piece in self._write(requests, stops, cancel, progress):
            out[row] += piece
        return out

    def save(self, path: str | Path) -> None:
        """Write the model as a bundle: its programs as they were read, its files and manifest."""
        bundled.save(self.bundle, path)

    def encode(self, prompt: str, suffix: str | None = None) -> list[int]:
        """The tokens of a prompt, or of a text with its middle open; RequestError where they leave no room."""
        special, (before, after) = self.special, (self._ids(prompt), self._ids(suffix or ""))
        if suffix is None:
            tokens = [special["begin"]] * ("begin" in special) + before
        elif {"prefix", "suffix", "middle"} <= special.keys():
            prefix, middle = ([], before) if self.text.fill == "spm" else (before, [])
            tokens = [special["prefix"], *prefix, special["suffix"], *after, special["middle"], *middle]
        else:
            raise RequestError("this model does not fill in the middle", "suffix", "leave it out")
        if not tokens:
            raise RequestError("the prompt is empty", "prompt", "give some text")
        if len(tokens) >= self.text.context:
            most = self.text.context - 1
            raise RequestError(f"the prompt has {len(tokens)} tokens", "prompt", f"this model takes at most {most}")
        return tokens

    def _ids(self, text: str) -> list[int]:
        try:
            return list[int](self.tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError:  # what the library says of lone surrogates
            raise RequestError("the prompt has lone surrogates, which are no text", "prompt") from None

    def _special(self) -> dict[str, int]:
        found = dict[str, int]()
        for name, token in self.text.special().items():
            i = self.tokenizer.token_to_id(token)
            if i is None:
                raise FileError(f"the tokenizer has no token {token!r}", str(self.bundle.path) if self.bundle else "")
            found[name] = i
        return found

    def _requests(
        self,
        prompts: Sequence[str],
        suffixes: Sequence[str | None],
        seeds: Sequence[int],
        stop: str | Sequence[str],
        settings: dict[str, Any],
    ) -> tuple[list[Continuation], tuple[str, ...]]:
        """Checked requests, and the stop strings."""
        chosen = TextDefaults(**self.settings(**settings))
        sampling, keys = chosen.sampling(self.text.context), noise.seed_tensor(seeds).tolist()
        requests = []
        for prompt, suffix, key in zip(prompts, suffixes, keys, strict=True):
            tokens, first = self._healed(*texts("prompt", [prompt, *([] if suffix is None else [suffix])], 2))
            most = min(chosen.max_tokens and chosen.max_tokens + bool(first), self.text.context - len(tokens))
            requests.append(Continuation(tokens, sampling, key, most, first))
        return requests, texts("stop", stop, MOST_STOPS)

    def _healed(self, prompt: str, suffix: str | None = None) -> tuple[list[int], Sequence[int]]:
        """The tokens of a prompt but for its last, and what may stand in its place: itself, and those that begin as it.

        A prompt that ends in the midst of what is one token in every text the model has read, say a line's end before
        the next line's indentation, would leave it in a place where it has never been.
        """
        tokens = self.encode(prompt, suffix)
        apart = suffix is not None and self.text.fill == "psm"  # the middle is not right behind its prefix
        at = tokens.index(self.special["suffix"]) - 1 if apart else len(tokens) - 1
        last = tokens[at]
        if last not in self._longer:
            piece = self.bytes[last]
            self._longer[last] = [i for i, b in enumerate(self.bytes) if piece and b.startswith(piece)]
        first = self._longer[last]
        if len(first) < 2 or len(tokens) == 1:
            return tokens, ()
        return tokens[:at] + tokens[at + 1 :], [last, *(i for i in first if i != last)]

    def _write(
        self,
        requests: Sequence[Continuation],
        stops: Sequence[str],
        cancel: Cancel | None,
        progress: Progress | None,
    ) -> Iterator[tuple[int, str]]:
        """(request, piece of its text), at most ``BATCH`` requests at once."""
        before, total = 0, sum(r.most for r in requests)
        for first in range(0, len(requests), BATCH):
            part = requests[first : first + BATCH]
            running = Running(self.loop, part)
            try:
                for row, piece in self._pieces(running, stops, cancel):
                    if progress is not None:
                        progress(before + sum(running.given), total)
                    if piece:
                        yield first + row, piece
            finally:
                running.close()
            before += sum(r.most for r in part)

    def _pieces(self, running: Running, stops: Sequence[str], cancel: Cancel | None) -> Iterator[tuple[int, str]]:
        streams = [TextStream(stops) for _ in running.requests]
        while running.going:
            if asked(cancel):
                done = sum(running.given)
                raise Cancelled("the generation was cancelled", f"after {done} token{'s' * (done != 1)}")
            before = set(running.going)
            made = running.next()
            for row in sorted(before):
                stream = streams[row]
                piece = self.bytes[made[row]] if row in made else b""
                if running.given[row] == 1 and running.requests[row].first:
                    piece = piece[len(self.bytes[running.requests[row].first[0]]) :]  # the prompt's own end
                text = stream.push(piece, final=row not in running.going)
                if stream.stopped:
                    running.finish(row)
                yield row, text


def _spread(name: str, values: Sequence[Any], count: int) -> list[Any]:
    if len(values) not in (1, count):
        raise RequestError(f"{len(values)} {name} for {count} texts", name, "give one, or one a text")
    return [*values] * (count if len(values) == 1 else 1)
