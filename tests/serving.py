"""A running `gsa serve`, as tests ask it."""

import contextlib
import time

import httpx
import openai
import torch
from forks import Forked, gsa

from gsa.data import save_byte_tokenizer
from gsa.model import GSAConfig, GSAForCausalLM

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('not so') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_model(folder, **changes):
    """A random byte-level model in fp64, so that other ways to the same sum give the same text."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8)
    rest = dict(intermediate_size=64, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    GSAForCausalLM(GSAConfig(**(sizes | rest | changes))).double().save_pretrained(folder)
    save_byte_tokenizer(folder)
    (folder / "template.jinja").write_text(TEMPLATE)


class Serving:
    """A server process at a free port of this machine, and ways to ask it."""

    def __init__(self, *options):
        self.process = Forked(gsa, ["serve", *map(str, options), "--port", "0"])
        output = self.process.said[0]
        while not (said := output.read_text() if output.exists() else "").endswith("\n"):
            assert self.process.poll() is None, self.errors
            time.sleep(0.01)
        assert said.startswith("serving ")
        self.url = said.split()[-1].removesuffix("/v1")

    @property
    def errors(self):
        return self.process.said[1].read_text().splitlines()

    def client(self, kind=openai.OpenAI, key="none"):
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path, json, **options):
        return httpx.post(self.url + path, json=json, timeout=60, **options)

    def metrics(self, **headers):
        """Numbers by name, labels included."""
        text = httpx.get(f"{self.url}/metrics", headers=headers).raise_for_status().text
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def rest(self):
        """Metrics once no text is left; AssertionError if that does not come to pass."""
        for _ in range(300):
            found = self.metrics()
            if found["gsa_texts_open"] == 0 == found["gsa_rows_taken"]:
                return found
            time.sleep(0.1)
        raise AssertionError(f"still busy: {found}")

    def wait_for(self, name, value):
        """Until a metric has reached a value; AssertionError if it does not."""
        for _ in range(300):
            if self.metrics().get(name, 0) >= value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} never came to {value}")


@contextlib.contextmanager
def serving(*options):
    server = Serving(*options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
