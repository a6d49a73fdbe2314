"""From text to training batches: tokenize once into memory-mapped shards, then pack rows.

shards = prepare(PrepareConfig(inputs=("books",), out="shards/books"))
rows = PackedRows(shards, seq_len=1024, seed=0)   # or of several, by weight: open_rows
batch = rows.batch(position=0, rows=8)        # a pure function: no iterator to save or restore
"""

from gsa.data.byte_tokenizer import decode_bytes, save_byte_tokenizer
from gsa.data.mixture import MixedRows, MixedShards, open_rows
from gsa.data.packing import Batch, PackedRows, Rows, validation_batches
from gsa.data.preparation import PrepareConfig, prepare
from gsa.data.shards import TokenShards

__all__ = [
    "Batch",
    "MixedRows",
    "MixedShards",
    "PackedRows",
    "PrepareConfig",
    "Rows",
    "TokenShards",
    "decode_bytes",
    "open_rows",
    "prepare",
    "save_byte_tokenizer",
    "validation_batches",
]
