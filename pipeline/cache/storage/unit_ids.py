"""The ids of a plan's units as two numbers: an id is made when it is asked for, since a corpus may have many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from pipeline.cache.format.parquet import open_parquet, read_row_group
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store


@dataclass(frozen=True, slots=True)
class UnitIds(Sequence[str]):
    """Training units first, each split by number, as preparation numbers them: from 0, without a gap."""

    train: int
    held_out: int

    @classmethod
    def planned(cls, store: Store) -> "UnitIds":
        """Those of a prepared cache; holds one row group of the index at a time. Raises StorageError, DamageError."""
        import pyarrow.compute as pc

        where = store.where(layout.UNIT_INDEX)
        file = open_parquet(store.read(layout.UNIT_INDEX), where)
        units = file.metadata.num_rows
        groups = (read_row_group(file, group, where, ["unit_id"]) for group in range(file.num_row_groups))
        train = sum(pc.sum(pc.starts_with(group.column("unit_id"), "train-")).as_py() or 0 for group in groups)
        return cls(train, units - train)

    def __len__(self) -> int:
        """Units of both splits."""
        return self.train + self.held_out

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """The unit at that place, or those of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        return layout.unit_name("train", place) if place < self.train else self._held_out(place)

    def place(self, unit_id: str) -> int | None:
        """Where the unit stands; None where it is not planned."""
        held_out, number = layout.unit_order(unit_id)
        if number >= (self.held_out if held_out else self.train):
            return None
        return self.train + number if held_out else number

    def _held_out(self, place: int) -> str:
        return layout.unit_name("held_out", place - self.train)
