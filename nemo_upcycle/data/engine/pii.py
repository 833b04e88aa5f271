"""Replace e-mail addresses, IP addresses, card numbers and social security numbers, if a source asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.formatters import PIIFormatter

from nemo_upcycle.data.engine.ledger import LedgerStep


class _Kind(NamedTuple):
    pattern: re.Pattern[str]
    replacement: str
    is_one: Callable[[str], bool] | None = None


def has_check_digit(number: str) -> bool:
    """Return whether the last digit of a card number is the right check digit (Luhn, ISO/IEC 7812)."""
    digits = [int(digit) for digit in number if digit.isdigit()][::-1]
    doubled = (2 * digit for digit in digits[1::2])
    return (sum(digits[::2]) + sum(digit - 9 if digit > 9 else digit for digit in doubled)) % 10 == 0


_FORMATTER = PIIFormatter()  # used only for its patterns: its replacements depend on earlier replacements
#: Visa, Mastercard and Discover have four groups of four digits; American Express has groups of 4, 6 and 5.
_CARD = re.compile(
    r"(?<![\d.,-])(?:(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d)([ -]?)\d{4}\1\d{4}\1\d{4}"
    r"|3[47]\d\d([ -]?)\d{6}\2\d{5})(?![.,-]?\d)"
)
#: US social security numbers with hyphens. The excluded areas, groups and numbers are never issued.
_SOCIAL_SECURITY = re.compile(r"(?<![\d.,-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![.,-]?\d)")
_KINDS = {
    "email": _Kind(_FORMATTER.emails_replacer.regex, "email@example.com"),
    "ip": _Kind(_FORMATTER.ip_replacer.regex, "192.0.2.1", _FORMATTER.ip_replacer.validator),
    "card": _Kind(_CARD, "0000 0000 0000 0000", has_check_digit),
    "ssn": _Kind(_SOCIAL_SECURITY, "000-00-0000"),
}


class ReplacePII(LedgerStep):
    """Replaces the kinds of personal data that the task's source names, and counts the replacements."""

    type, name = "formatter", "PII"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        names = self.ledger.task.pii
        for document in data:
            for name in names:
                document.text = self._replaced(name, document.text)
            yield document

    def _replaced(self, name: str, text: str) -> str:
        kind = _KINDS[name]

        def replace(match: re.Match[str]) -> str:
            if kind.is_one and not kind.is_one(match[0]):
                return match[0]
            self.ledger.pii[name] += 1
            return kind.replacement

        return kind.pattern.sub(replace, text)
