"""Make a small data set of captioned pictures from the rendered emoji, to try training.

python examples/small_data_set.py runs/emoji/data runs/small/data          # 200 of them

It contains the minimum that training needs: pictures, and `metadata.jsonl` with `file_name` and `text`.
"""

import argparse
import json
import shutil
from pathlib import Path

from unclip.data.folder import read_records


def choose(records: list, count: int) -> list:
    """At most `count` records, evenly spaced in the data set, one for each concept."""
    concepts = {
        record.concept or record.file_name: record for record in reversed(records)
    }  # the first record of each concept
    first = list(reversed(concepts.values()))
    count = min(count, len(first))
    return [first[place * len(first) // count] for place in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a data set: unclip data emoji --out SOURCE")
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    rows = []
    for number, record in enumerate(choose(read_records(arguments.source), arguments.count)):
        source = arguments.source / record.file_name
        name = f"{number:03d}{source.suffix}"
        shutil.copyfile(source, arguments.out / name)
        rows.append({"file_name": name, "text": record.captions[0]})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (arguments.out / "metadata.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(rows)} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
