"""Comparisons with the reference, and the largest differences of a run as its last lines."""

from collections.abc import Callable

import pytest

from ..rounding import assert_equal_but_rounding

DIFFERENCE = "difference of "


@pytest.fixture
def agree(record_property) -> Callable[..., None]:
    """`agree(kind, got, run, operands)` is `assert_equal_but_rounding`, and notes how large the difference was."""

    def agree(kind: str, *comparison) -> None:
        record_property(DIFFERENCE + kind, assert_equal_but_rounding(*comparison))

    return agree


def pytest_terminal_summary(terminalreporter) -> None:
    largest: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith(DIFFERENCE):
                kind = name.removeprefix(DIFFERENCE)
                largest[kind] = max(largest.get(kind, 0.0), value)
    for kind, value in sorted(largest.items()):
        terminalreporter.write_line(f"largest difference from the reference, {kind}: {value:.1e}")
