"""Tokens to text: whole characters, stop strings across pieces."""

from __future__ import annotations

import gpts
from hypothesis import given
from hypothesis import strategies as st

from fusegen.models.text import TextStream, token_bytes


def streamed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    return [*(stream.push(p) for p in pieces), stream.push(b"", final=True)], stream.stopped


@given(st.text(), st.data())
def test_any_cut_of_a_text_gives_the_text_and_no_broken_character(text: str, draw: st.DataObject) -> None:
    whole = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    out, _ = streamed(pieces)
    assert "".join(out) == whole.decode()
    for done in range(len(out)):
        assert whole.decode().startswith("".join(out[:done])), "a character was given before it was whole"


@given(st.binary(max_size=40), st.integers(1, 5))
def test_bytes_that_are_no_text_give_replacements(data: bytes, size: int) -> None:
    out, _ = streamed([data[i : i + size] for i in range(0, len(data), size)])
    assert "".join(out) == data.decode("utf-8", "replace")


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_a_text_ends_before_its_first_stop_string(text: str, stops: list[str], size: int) -> None:
    out, stopped = streamed([text[i : i + size].encode() for i in range(0, len(text), size)], tuple(stops))
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    assert "".join(out) == (text[: min(found)] if found else text) and stopped == bool(found)


def test_what_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    stream = TextStream(["\ndef ", "END"])
    assert stream.push(b"x = 1\n") == "x = 1"
    assert stream.push(b"de") == ""
    assert stream.push(b"l x") == "\ndel x"
    assert stream.push(b"E") == "" and stream.push(b"N", final=True) == "EN"


def test_every_token_s_bytes_are_known() -> None:
    tok = gpts.tokenizer()
    table = token_bytes(tok)
    text = "def café():\n\treturn '👋🏽日本'\x00\r\n"
    assert b"".join(table[i] for i in tok.encode(text, add_special_tokens=False).ids) == text.encode()
    assert {bytes([b]) for b in range(256)} <= set(table) and table[tok.token_to_id("<|end|>")] == b""
