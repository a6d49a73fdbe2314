"""A model behind HTTP, speaking OpenAI's API: `gsa serve MODEL`.

    config.py      what it is asked
    bodies.py      bodies that are understood, and errors in OpenAI's shape
    prefixes.py    states of what was read and written, to go on from
    engine.py      the thread that owns the decoder: rows, reading, steps
    answers.py     tokens to text, cut at stop strings; events and whole answers
    service.py     what the routes do, apart from HTTP
    app.py         the routes, and who may ask
    metrics.py     what Prometheus reads
    run.py         from a folder to a listening process, until a signal

`serve` loads nothing heavy before it is called.
"""

from gsa.generation.server.config import ServeConfig

__all__ = ["ServeConfig", "serve"]


def serve(config: ServeConfig) -> None:
    """Answers requests until SIGINT or SIGTERM.

    ImportError without the packages of the extra `serve`; ValueError and OSError for a model, a
    file or an address that cannot be used, before anything is answered.
    """
    try:
        from gsa.generation.server.run import run
    except ModuleNotFoundError as error:
        raise ImportError(
            f"gsa serve: the package {error.name} is missing; pip install 'gated-slots[serve]'"
        ) from error
    run(config)
