"""Lines of the log on standard error: above a progress bar, with colors on a terminal."""

from __future__ import annotations

import logging
import os
from typing import TextIO

COLORS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}  # codes of ANSI terminals


def use_colors(stream: TextIO) -> bool:
    """Whether a stream shows colors: a terminal that is not dumb, without NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class LogHandler(logging.StreamHandler[TextIO]):
    """Write lines above a progress bar, if one is at work; warnings have a color on a terminal."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self.colored = use_colors(stream)
        self.setFormatter(logging.Formatter("%(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        """The message, in the color of its level."""
        text, color = super().format(record), COLORS.get(record.levelno)
        return f"\033[{color}m{text}\033[0m" if color and self.colored else text

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record while no bar is on the line."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
