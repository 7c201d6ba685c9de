"""Text from tokens as they come: whole characters only, up to the stop string that is complete first."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one row, piece by piece; together the pieces are the text up to where it stops, however it is cut.

    That is before the stop string that is complete first; of two that end together, before the longer one.

    A token's bytes may end inside a character, and may begin a stop string that a later token ends or does not:
    what is not certain yet is held back. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        """`pieces` are the bytes of each token; empty stop strings are ignored."""
        self.pieces, self.stops, self.stopped = pieces, [stop for stop in stops if stop], False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """What is certain once this token is read: maybe nothing. After `stopped`, nothing."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(self.pieces[token])
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: sum(min(found))]
        certain = len(text) - self._begun(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back for a stop string that did not come; a character that was begun is left out."""
        held, self._held, self.stopped = self._held, "", True
        return held

    def _begun(self, text: str) -> int:
        """Characters at the end of the text that may begin a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0
