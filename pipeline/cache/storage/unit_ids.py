"""The unit ids of a cache as a sequence of strings that are made on access, since a corpus may have millions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from pipeline.cache.format.parquet import open_parquet, read_row_group
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store


@dataclass(frozen=True, slots=True)
class UnitIds(Sequence[str]):
    """Ids of `train` training units, then of `held_out` held-out units; each split is numbered from 0 without gaps."""

    train: int
    held_out: int

    @classmethod
    def read(cls, store: Store) -> "UnitIds":
        """Read those of a prepared cache, one row group of the index at a time. Raises StorageError, DamageError."""
        import pyarrow.compute as pc

        where = store.where(layout.UNIT_INDEX)
        file = open_parquet(store.read(layout.UNIT_INDEX), where)
        units = file.metadata.num_rows
        groups = (read_row_group(file, group, where, ["unit_id"]) for group in range(file.num_row_groups))
        train = sum(pc.sum(pc.starts_with(group.column("unit_id"), "train-")).as_py() or 0 for group in groups)
        return cls(train, units - train)

    def __len__(self) -> int:
        """Return the number of units of both splits."""
        return self.train + self.held_out

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """Return the unit id at an index, or a list for a slice. Raises IndexError."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place < self.train:
            return layout.format_unit_id("train", place)
        return layout.format_unit_id("held_out", place - self.train)

    def index_of(self, unit_id: str) -> int | None:
        """Return the index of a unit id; None if the cache has no such unit."""
        held_out, number = layout.unit_sort_key(unit_id)
        if number >= (self.held_out if held_out else self.train):
            return None
        return self.train + number if held_out else number
