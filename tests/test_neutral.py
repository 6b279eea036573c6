"""NEUTRAL FORM: whole answers and streams meet in fold and unfold."""

import random

import pytest

import llm_router as R


def random_block(dice):
    text = "".join(dice.choice("ab 東🙂\n") for _ in range(dice.randrange(6)))
    extra = dice.choice([None, {"anthropic": {"signature": "s"}}])
    return dice.choice(
        [
            R.Text(text, extra),
            R.Thinking(text, extra),
            R.Refusal(text),
            R.ToolCall("c%d" % dice.randrange(99), "tool", text),
            R.Opaque("responses", {"type": "x"}),
        ]
    )


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_unfolded_and_folded_is_the_same_answer(seed):
    dice = random.Random(seed)
    blocks = [random_block(dice) for _ in range(dice.randrange(5))]
    usage = dice.choice([None, R.Usage(1, 2, 3, 4, 5)])
    response = R.ChatResponse("id", "m", blocks, dice.choice(R.STOP_REASONS), "", usage, 7)
    assert R.fold(R.unfold(response)) == response


@pytest.mark.parametrize("seed", range(50))
def test_an_unfolded_answer_keeps_the_order_of_events(seed):
    dice = random.Random(seed)
    events = list(R.unfold(R.ChatResponse("id", "m", [random_block(dice) for _ in range(4)])))
    assert isinstance(events[0], R.Started) and isinstance(events[-1], R.Finished)
    is_open = False
    for event in events[1:-1]:
        if isinstance(event, R.Opened):
            assert not is_open
            is_open = True
        elif isinstance(event, R.Closed):
            assert is_open
            is_open = False
        else:
            assert is_open and not (isinstance(event, R.Delta) and not event.text)
    assert not is_open


def test_a_stream_without_an_end_folds_to_an_error():
    """Trap 14."""
    folded = R.fold([R.Started("id", "m"), R.Opened(R.Text("")), R.Delta("half")])
    assert isinstance(folded, R.ErrorInfo) and folded.code == "truncated"


def test_a_stream_that_failed_folds_to_its_error():
    error = R.ErrorInfo(529, "overloaded")
    assert R.fold([R.Started("id", "m"), R.Failed(error)]) is error


def test_extensions_of_a_block_are_joined():
    events = [
        R.Started("id", "m"),
        R.Opened(R.Thinking("")),
        R.Extended("anthropic", {"signature": "ab"}),
        R.Extended("anthropic", {"signature": "cd", "list": [1]}),
        R.Extended("anthropic", {"list": [2]}),
        R.Closed(),
        R.Finished(),
    ]
    assert R.fold(events).blocks == [R.Thinking("", {"anthropic": {"signature": "abcd", "list": [1, 2]}})]


def test_tidying_a_tidy_conversation_changes_nothing():
    messages = [
        R.Message("user", [R.Text("q")]),
        R.Message("assistant", [R.Text("a"), R.ToolCall("c1", "t", "{}")]),
        R.Message("user", [R.ToolResult("c1", [R.Text("r")]), R.Text("go on")]),
    ]
    assert R.tidy_messages(messages) == messages
