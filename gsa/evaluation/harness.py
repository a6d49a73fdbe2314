"""Our models for lm-eval: choices scored through forked states, answers written by the decoder.

lm = StateLM(model, tokenizer, rows=8)
lm_eval.simple_evaluate(lm, tasks=["arc_easy"])
"""

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gsa.evaluation.scoring import Request, score
from gsa.generation.decoder import Decoder
from gsa.generation.sampling import Sampling

MAX_NEW_TOKENS = 256
"""Of an answer, where the task does not say."""
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class StateLM(TemplateLM):
    """A model of this package, of any architecture, as lm-eval asks for it.

    Gives the numbers of lm-eval's own HFLM within rounding, texts being cut in the same way, but
    reads what requests begin with alike only once.

    Args:
        model: a `GSAForCausalLM` in eval mode.
        rows: texts at once.
        max_length: tokens that the model sees at most, longer contexts losing their start; None for
            the config's max_position_embeddings.
    """

    def __init__(self, model: Any, tokenizer: Any, *, rows: int = 8, max_length: int | None = None):
        super().__init__()
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.max_length = max_length or model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the begin token, or else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder that writes answers."""
        return Decoder(self.model, rows=self.rows, capacity=self.max_length)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # type: ignore[override]
        """Token ids; a begin token that stands in the text already is not added once more."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not string.startswith(prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(  # type: ignore[override]
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(
                    "requests: expected contexts and continuations of at least one token, and "
                    f"continuations of at most {self.max_length}, got {len(context)} and "
                    f"{len(continuation)}"
                )
            # The last token is not read, so max_length of those before it are.
            kept = max(self.max_length + 1 - len(continuation), 1)
            asked.append(Request(tuple(context[-kept:]), tuple(continuation)))
        answers = [(x.logprob, x.is_greedy) for x in score(self.model, asked, rows=self.rows)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of max_length tokens; the first follows the prefix."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings, which is left out."""
        asked = [self._wish(place, *request.args) for place, request in enumerate(requests)]
        texts: list[list[int]] = [[] for _ in asked]
        waiting, owner = deque(range(len(asked))), {}
        while waiting or owner:
            while waiting and len(owner) < self.rows:
                place = waiting.popleft()
                prompt, sampling, _ = asked[place]
                state = self.decoder.prefill(prompt)
                ends = {*self.decoder.ends, self.eot_token_id}
                owner[self.decoder.start(state, sampling, ends=ends)] = place
            for row, token, end in self.decoder.advance():
                if row not in owner:
                    continue
                place = owner[row]
                texts[place].append(token)
                if end or self._stopped(texts[place], asked[place][2]):
                    self.decoder.release(row)
                    del owner[row]
        answers = []
        for request, tokens, (_, _, stops) in zip(requests, texts, asked, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _wish(
        self, seed: int, context: str, options: dict[str, Any]
    ) -> tuple[list[int], Sampling, list[str]]:
        """(prompt, how to write, stop strings) of a request."""
        if unknown := set(options) - GENERATION:
            raise ValueError(
                f"generation_kwargs: expected some of {', '.join(sorted(GENERATION))}, got "
                f"{', '.join(sorted(unknown))}"
            )
        most = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        if most >= self.max_length:
            raise ValueError(
                f"length: expected more than the {most} tokens that a task's answers may take, got "
                f"{self.max_length}"
            )
        temperature = float(options.get("temperature", 1.0))
        greedy = not options.get("do_sample", False) or temperature == 0
        sampling = Sampling(
            max_new_tokens=most,
            greedy=greedy,
            temperature=1.0 if greedy else temperature,
            top_k=0 if greedy else int(options.get("top_k", 0)),
            top_p=1.0 if greedy else float(options.get("top_p", 1.0)),
            seed=seed,
        )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        return prompt or [self.prefix_token_id], sampling, [stop for stop in stops if stop]

    def _stopped(self, tokens: list[int], stops: list[str]) -> bool:
        """Whether a stop string has come: looked for at the end, a token being a byte at least."""
        if not stops:
            return False
        tail = tokens[-(4 + 4 * max(map(len, stops))) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in stops)
