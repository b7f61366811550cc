"""Standard error on which a certain text is answered with Ctrl-C, at once."""

import io


class Interrupting(io.StringIO):
    """Raises what Ctrl-C does when the text is to be written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def write(self, text: str) -> int:
        if self._text in text:
            raise KeyboardInterrupt
        return super().write(text)
