"""The samples in what ``encode_records`` and ``encode_classified`` say of each record."""

from collections.abc import Iterable

from ds_interlock.hf.data.samples import Encoded, Sample


def samples_of(encoded: Iterable[Encoded]) -> list[Sample]:
    """All of them, in the order of their records."""
    return [sample for one in encoded for sample in one.samples]
