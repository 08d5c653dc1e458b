"""Tokens of the Hub taken out of messages and logs."""

from __future__ import annotations

import logging
import re

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{10,}|(?<=Bearer )[^\s;,'\")]+")


def redact(text: str, token: str | None = None) -> str:
    """Text without the token, and without anything that looks like one."""
    return TOKEN.sub("***", text.replace(token, "***") if token else text)


class Redaction(logging.Filter):
    """Takes tokens out of what is logged."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), self.token), None
        return True
