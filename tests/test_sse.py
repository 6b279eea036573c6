"""SSE: bytes to events, however they are cut."""

import itertools

import pytest

import llm_router as R
from sse_decoder import SseDecoder

LINE_ENDS = ["\n", "\r\n", "\r"]
TEXT = ': hello\n\nevent: a\ndata: {"x": "東京 🙂"}\nid: 7\nretry: 5\n\ndata:no space\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
EVENTS = [("a", '{"x": "東京 🙂"}'), ("", "no space"), ("", "one\ntwo"), ("", "[DONE]")]


def decode(pieces):
    decoder = SseDecoder()
    found = [event for piece in pieces for event in decoder.feed(piece)]
    return found + decoder.finish()


@pytest.mark.parametrize("end", LINE_ENDS, ids=["LF", "CRLF", "CR"])
def test_every_cut_of_a_stream_gives_the_same_events(end):
    """Traps 1, 2, 3, 4, 5, 6, 7."""
    data = TEXT.replace("\n", end).encode()
    for cut in range(len(data) + 1):
        assert decode([data[:cut], data[cut:]]) == EVENTS
    assert decode([data[at : at + 1] for at in range(len(data))]) == EVENTS


@pytest.mark.parametrize("first, second", list(itertools.product(LINE_ENDS, LINE_ENDS)))
def test_any_two_line_ends_end_an_event(first, second):
    assert decode([("data: x" + first + second).encode()]) == [("", "x")]


def test_one_crlf_is_one_line_end_and_no_event_border():
    """Trap 2."""
    splitter = R.EventSplitter()
    assert splitter.feed(b"data: a\r\n") == b""
    assert splitter.feed(b"data: b\r\n\r\n") == b"data: a\r\ndata: b\r\n\r\n"


def test_whole_events_come_out_raw_and_the_rest_is_kept():
    splitter = R.EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n\ndata: 3") == b"data: 1\n\ndata: 2\n\n"
    assert splitter.feed(b"3\n") == b""
    assert splitter.feed(b"\n") == b"data: 33\n\n"
    assert splitter.finish() == b""


def test_an_event_without_its_blank_line_is_found_at_the_end():
    assert decode([b"data: [DONE]"]) == [("", "[DONE]")]


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    assert decode([b"\xef\xbb\xbfdata: x\n\n"]) == [("", "x")]


def test_a_huge_event_passes_and_an_endless_one_is_an_error_of_the_upstream():
    """Trap 8."""
    line = b"data: " + b"x" * 300_000 + b"\n\n"
    assert len(decode([line[at : at + 1000] for at in range(0, len(line), 1000)])[0].data) == 300_000
    splitter = R.EventSplitter(max_event_bytes=1000)
    with pytest.raises(R.UpstreamError):
        for _ in range(200):
            splitter.feed(b"data: no end")


def test_what_is_written_reads_back():
    """Trap 17."""
    text = R.dump_json({"text": 'a "quote"\n\u2028 and \x00'})
    assert decode([R.sse_event(text, "name"), R.SSE_COMMENT, R.sse_event(text)]) == [
        ("name", text.decode()),
        ("", text.decode()),
    ]


@pytest.mark.parametrize(
    "event, text",
    [
        ('{"id":"a","text":"%s"}', r"a \"quote\"\n\u20ac"),
        ('{"id":"%s","text":"b"}', "東"),
        ('{"text":"%s","note":"ö"}', "with blanks"),
    ],
)
def test_a_stencil_finds_the_text_in_which_an_event_differs(event, text):
    stencil = R.make_stencil(("data: " + event % "first" + "\n\n").encode(), "first")
    assert stencil.text_in(("data: " + event % text + "\n\n").encode()) == R.load_json('"%s"' % text)


@pytest.mark.parametrize(
    "other",
    [
        'data: {"a":"x","b":2}\n\n', 'data: {"a":"x","b":1}\n', 'data: {"a":"x","b":1}\n\ndata: {"a":"y","b":1}\n\n',
        'data: {"a":"x\n\n', 'data: {"a":"x"y","b":1}\n\n', 'data: {"a":"x\ny","b":1}\n\n', 'data: {"a":x","b":1}\n\n',
        'data: {"a":"x","a":"y","b":1}\n\n', 'data: {"a":"\\x","b":1}\n\n', "", ": ping\n\n",
    ],
)  # fmt: skip
def test_a_stencil_takes_nothing_but_an_event_of_its_shape(other):
    stencil = R.make_stencil(b'data: {"a":"first","b":1}\n\n', "first")
    assert stencil.text_in(b'data: {"a":"x","b":1}\n\n') == "x"
    assert stencil.text_in(other.encode()) == ""


@pytest.mark.parametrize(
    "event, text", [('{"a":"x","b":"x"}', "x"), ('{"a":"x"}', "y"), (r'{"a":"\u0078","b":"x"}', "x")]
)
def test_no_stencil_is_made_where_it_is_not_clear_which_text_is_meant(event, text):
    assert R.make_stencil(event.encode(), text) is None
