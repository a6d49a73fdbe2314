"""What a run tells while it goes: metrics.jsonl and the trackers beside it."""

from pathlib import Path
from typing import Any

from gsa.training.config import TrainConfig
from gsa.training.distributed import Team
from gsa.training.metrics import MetricsLog
from gsa.training.sinks import Sinks, open_sinks


class Records:
    """Writes for the whole team in its first process; does nothing in the others.

    step, validated: the last step, and the last validated step, that the run has behind it.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, team: Team, *, step: int, validated: int
    ) -> None:
        self._sinks = Sinks({})
        self._metrics: MetricsLog | None = None
        self._folder, self._config = folder, config
        self._from = step, validated
        team.ask_first(self._open)

    def _open(self) -> None:
        step, validated = self._from
        settings = self._config.to_dict()
        self._sinks = open_sinks(self._config.sinks, self._folder, settings, step)
        self._metrics = MetricsLog(self._folder, after_step=step, validated=validated)

    def write(self, line: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(**line)
            self._sinks.write(line)

    def sync(self) -> None:
        """Force the lines to where they are kept: a checkpoint must not be ahead of them."""
        if self._metrics is not None:
            self._sinks.sync()
            self._metrics.sync()

    def close(self) -> None:
        if self._metrics is not None:
            self._sinks.close()
            self._metrics.close()
