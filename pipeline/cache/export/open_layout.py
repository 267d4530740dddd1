"""`stillhouse export`: a cache as Parquet lists, which pandas, DuckDB, Polars and Hugging Face `datasets` can read.

sequences/<unit>.parquet   one row per sequence: ids, `input_ids`, `loss_mask` and `byte_end` as lists
positions/<unit>.parquet   one row per position: label, scalars, `entry_id` and `entry_logweight` as lists
README.md                  the meaning of the columns, written last
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.export.tables import position_table, sequence_table
from pipeline.cache.format.parquet import to_parquet
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.errors import UsageError

README = "README.md"
_TABLES = ("sequences", "positions")


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """Counts of what was written."""

    folder: str
    sequences: int
    positions: int
    files: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"wrote {self.sequences} sequences, {self.positions} positions in {self.files} Parquet files, "
            f"{self.bytes / 1e6:.1f} MB: {self.folder}\n"
            f"  {self.folder.rstrip('/')}/{README} explains the columns; for example, with DuckDB:\n"
            f"  SELECT label_id, label_logprob, entry_id FROM '{self.folder.rstrip('/')}/positions/*.parquet' LIMIT 5"
        )


def export_cache(uri: str | Path | Store, folder: str | Path | Store) -> ExportSummary:
    """Write every committed row into `folder`, a path or URI, with one unit in memory at a time.

    Raises UsageError where the folder has files of anything else, StorageError, DamageError.
    """
    reader, target = CacheReader.open(uri), Store.open(folder)
    _check_target(reader, target)
    sequences = positions = files = size = 0
    for unit_id in reader.unit_ids():
        rows = reader.read_unit(unit_id)
        tables = (sequence_table(rows), position_table(rows, reader.spec))
        for name, table in zip(_TABLES, tables, strict=True):
            data = to_parquet([table], table.schema)
            target.put(f"{name}/{unit_id}.parquet", data)
            files, size = files + 1, size + len(data)
        sequences, positions = sequences + len(rows), positions + tables[1].num_rows
    target.put(README, _readme(reader).encode())
    return ExportSummary(target.uri, sequences, positions, files, size)


def _check_target(reader: CacheReader, target: Store) -> None:
    own = {README, *(f"{table}/{unit_id}.parquet" for table in _TABLES for unit_id in reader.unit_ids())}
    others = [path for path in target.list() if path not in own]
    if others:
        raise UsageError(f"export to {target.uri}: expected an empty folder, found {others[0]}; choose another folder")


def _readme(reader: CacheReader) -> str:
    """Write the dataset card; its front matter lists the files of each configuration for `datasets`."""
    capture = reader.spec.capture
    configs = "".join(
        f"- config_name: {table}\n  data_files:\n"
        + "".join(
            f"  - {{split: {split}, path: {table}/{split}-*.parquet}}\n"
            for split in ("train", "held_out")
            if reader.unit_ids(split)
        )
        for table in _TABLES
    )
    return f"""---
configs:
{configs}---

# Signals of {reader.description.name}

Exported from a stillhouse cache with fingerprint `{reader.identity.fingerprint}`: target mode `{capture.mode}`,
k={capture.k}, V={reader.spec.vocabulary}.

`sequences` has one row per sequence. `loss_mask` is 1 where a token counts as a label, `byte_end` is where each token
ends in the document's UTF-8 bytes.

`positions` has one row per position: the teacher's prediction of `label_id` given the tokens up to `token_id`.
Logarithms are natural, at temperature 1.

| column | meaning |
|---|---|
| `label_logprob`, `entropy` | log-probability of the label; entropy of the full distribution, in nats |
| `entry_id`, `entry_logweight` | entries by falling weight: probabilities in `topk` and `topp`, else sampling weights |
| `tail_logmass` | log of the probability outside the entries; -inf where their weights sum to 1 |
| `log_partition` | log sum of p^(1/T) at T = {", ".join(f"{t:g}" for t in capture.temperatures)} |
| `tail_shape` | S(1/2), S'(1/2), S'(1) of S(b) = log sum of p^b over the tokens outside the entries; with \
S(1) = `tail_logmass` and S(0) = log of their number they give the tail at any temperature 1/b from 1 to 2.5 |
| `boundary_logmass` | log of the probability that the next token starts a word |
| `hidden_*` | hidden states of the teacher after that many layers; `normed`: after the final norm |
"""
