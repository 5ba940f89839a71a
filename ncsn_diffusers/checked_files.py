"""
Which files of images or arrays have been read without an error, and what was found in them, remembered from one start
to the next.

A file counts as unchanged while its path, its size and its times of modification and of status change (`ctime`) stay
the same. A program cannot set the last of these, so a file that was replaced under its old date is noticed, too. The
findings of a folder are kept in one parquet file in the cache of `datasets`. Its name is a hash of the folder and of
everything else that the findings depend on. It is written to one side and renamed, so that processes that start
together never read half a file.
"""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_SETTLED = 2.0  # seconds; a younger file may change again without another time of change, so it is not remembered


class CheckedFiles:
    """
    What earlier starts found in files.

    Args:
        paths (`list` of `str` or `None`): the files; what is not the absolute path of a file is never remembered.
        folder (`str`): the folder that holds them all.
        settings (`list`): everything else that the findings depend on, as JSON can hold it.
    """

    def __init__(self, paths: list[str | None], folder: str, settings: list):
        name = hashlib.sha256(json.dumps([folder, settings]).encode()).hexdigest()[:32]
        self.file = Path(datasets.config.HF_DATASETS_CACHE) / "ncsn_diffusers" / f"{name}.parquet"
        self.paths = pa.array(paths, pa.string())
        newest = time.time() - _SETTLED
        self.stamps = pa.array([_stamp(path, newest) for path in paths], pa.string())  # before the images are read

    def find(self) -> tuple[np.ndarray, list]:
        """The findings, and for each file the number of its own: int64 of shape `(num_paths,)`, -1 if unknown."""
        try:
            table = self._read()
            texts = table["finding"].combine_chunks().dictionary_encode()
            findings = [json.loads(text) for text in texts.dictionary.to_pylist()]
        except (OSError, pa.ArrowException, KeyError, ValueError):  # there is none, or it is damaged
            return np.full(len(self.paths), -1), []
        places = pc.index_in(self.paths, value_set=table["path"].combine_chunks())
        unchanged = pc.equal(table["stamp"].combine_chunks().take(places), self.stamps).fill_null(False)
        numbers = pc.if_else(unchanged, texts.indices.take(places), -1)
        return numbers.to_numpy(zero_copy_only=False).astype(np.int64), findings

    def records(self, numbers: np.ndarray, findings: list) -> pa.Table:
        """What `save` takes: the files that have a number (from 0 up), and which of `findings` it stands for."""
        texts = pa.array([json.dumps(finding) for finding in findings], pa.string())
        column = texts.take(pa.array(numbers, mask=numbers < 0))
        table = pa.table({"path": self.paths, "stamp": self.stamps, "finding": column})
        return table.drop_null()

    def save(self, records: list[pa.Table]) -> None:
        """
        Keep these records, in place of what was known of the same paths.

        Raises:
            OSError: the cache cannot be written.
        """
        table = pa.concat_tables(records)
        try:
            known = self._read()
            known = known.filter(pc.invert(pc.is_in(known["path"], value_set=table["path"].combine_chunks())))
            table = pa.concat_tables([known, table])
        except (OSError, pa.ArrowException, KeyError, ValueError):
            pass
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            pq.write_table(table, aside, write_page_checksum=True)
            os.replace(aside, self.file)
        finally:
            aside.unlink(missing_ok=True)

    def _read(self) -> pa.Table:
        table = pq.read_table(self.file, page_checksum_verification=True)
        return table.select(["path", "stamp", "finding"]).cast(_SCHEMA)


_SCHEMA = pa.schema([(name, pa.string()) for name in ("path", "stamp", "finding")])


def _stamp(path: str | None, newest: float) -> str | None:
    """What changes with the file; `None` for what is not a file, or changed after `newest` (seconds since 1970)."""
    if path is None or not os.path.isabs(path):
        return None
    try:
        state = os.stat(path)
    except OSError:
        return None
    return f"{state.st_size:x}.{state.st_mtime_ns:x}.{state.st_ctime_ns:x}" if state.st_ctime <= newest else None
