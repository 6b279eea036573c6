"""Bytes to server-sent events, as the router's stream processors put its two parts together."""

import llm_router as R


class SseDecoder:
    """`feed(bytes)` gives the events that they complete, `finish()` what an unterminated end still held."""

    def __init__(self, max_event_bytes=R.MAX_EVENT_BYTES):
        self._splitter = R.EventSplitter(max_event_bytes)

    def feed(self, data):
        return R.parse_events(self._splitter.feed(data))

    def finish(self):
        return R.parse_events(self._splitter.finish())
