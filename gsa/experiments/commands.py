"""What `gsa reproduce` knows, by name: the config of each experiment and what runs it."""

from collections.abc import Callable
from typing import Any

from gsa.experiments.figure3a import Figure3aConfig, reproduce_figure3a
from gsa.experiments.figure4 import (
    Figure4abConfig,
    Figure4cConfig,
    reproduce_figure4ab,
    reproduce_figure4c,
)
from gsa.experiments.suites import RecallConfig, Table4Config, reproduce_recall, reproduce_table4
from gsa.experiments.table1 import Table1Config, reproduce_table1
from gsa.experiments.table2 import Table2Config, reproduce_table2
from gsa.experiments.table3 import Table3Config, reproduce_table3

EXPERIMENTS: dict[str, tuple[type, Callable[..., Any]]] = {
    "table1": (Table1Config, reproduce_table1),
    "table2": (Table2Config, reproduce_table2),
    "table3": (Table3Config, reproduce_table3),
    "recall": (RecallConfig, reproduce_recall),
    "table4": (Table4Config, reproduce_table4),
    "figure3a": (Figure3aConfig, reproduce_figure3a),
    "figure4a": (Figure4abConfig, reproduce_figure4ab),
    "figure4b": (Figure4abConfig, reproduce_figure4ab),
    "figure4c": (Figure4cConfig, reproduce_figure4c),
}
