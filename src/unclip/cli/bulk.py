"""Options and the loop of bulk runs, which `unclip generate --from` and `unclip embed` share."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli.messages import bar, error, note
from unclip.cli.options import flag, option
from unclip.cli.output import SOME_FAILED

if TYPE_CHECKING:
    from unclip.pipelines.bulk import Results
    from unclip.pipelines.workers import Row, Work

MAX_NAMED = 10
"""Failed rows that are named on stderr; the index has them all."""


@dataclass(frozen=True)
class Bulk:
    """Options of bulk runs.

    Attributes:
        table: Make each row of a table: .parquet, .csv, .tsv, .jsonl or .txt.
        processes: Worker processes, each with the whole model; with --ray, actors.
        ray: Work on a Ray cluster: HOST:PORT, auto for a running one, or local to start one.
        retry_failed: Try rows again that failed in an earlier run.
    """

    table: Annotated[Path | None, option("FILE", "--from")] = None
    processes: Annotated[
        int | None, option("N", min=1, max=1024, default="1; with --ray one for each GPU, or else CPU")
    ] = None
    ray: Annotated[str | None, option("ADDRESS", "--ray", default="no cluster")] = None
    retry_failed: Annotated[bool, flag("--retry-failed")] = False


def run_bulk(
    bulk: Bulk, rows: Sequence["Row"], results: "Results", work: "Work", *, batch_size: int, quiet: bool, unit: str
) -> int:
    """Make the rows that have no result yet, with a progress bar. Returns: the number of failed rows.

    Args:
        bulk: the options.
        rows: all rows.
        results: an opened folder of results.
        work: what makes a batch.
        batch_size: rows computed at once.
        quiet: whether to print only errors.
        unit: the noun for a row in the progress bar and the summary.
    """
    from unclip.pipelines.workers import Failed, batches_of, work_off

    def missing(row: "Row") -> bool:
        return results.is_missing(row, bulk.retry_failed)

    start, num_existing = time.monotonic(), sum(not missing(row) for row in rows)
    batches = batches_of(rows, missing, batch_size)
    with bar(
        quiet, desc=bulk.table and bulk.table.name, unit=unit, total=len(rows), initial=num_existing
    )() as progress:
        bad = [(row, Failed(row.error)) for row in rows if row.error and missing(row)]
        results.add(bad)
        progress.update(len(bad))
        for done in work_off(batches, work, processes=bulk.processes, ray=bulk.ray):
            new = [(row, made) for row, made in done if missing(row)]
            results.add(new)
            progress.update(len(new))
    results.finish(rows)
    failed = {place: text for place, row in enumerate(rows, 1) if (text := results.lines[row.id].get("error"))}
    for place, text in list(failed.items())[:MAX_NAMED]:
        error(f"{unit} {place} of {len(rows)}: {text}")
    seconds, num_new = time.monotonic() - start, len(rows) - num_existing
    if not quiet:
        note(
            f"{len(rows):,} {unit}s: {num_new:,} new, {num_existing:,} existing, {len(failed):,} failed; "
            f"{seconds:,.1f} s, {num_new / max(seconds, 1e-3):.2f} {unit}s a second"
        )
    return len(failed)


def exit_if_failed(num_failed: int, num_rows: int) -> None:
    """Exit with the right code if rows failed."""
    if num_failed:
        raise typer.Exit(SOME_FAILED if num_failed < num_rows else 1)
