"""lm-eval's own model of a completions API: its payloads, its parsing, its retries. Only the tokenizer is ours: a token is a byte.

A model that continues greedily must find its own continuation greedy: that is what multiple choice and exact match rest on.
"""

import os

from seen import KEY, MODEL, URL, seen

os.environ["OPENAI_API_KEY"] = KEY

import importlib.metadata
import math

import requests
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


class Bytes:
    """A tokenizer in the form of tiktoken's."""

    eot_token = 0

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")

    def decode_batch(self, lists):
        return [self.decode(tokens) for tokens in lists]


def model(**settings):
    api = LocalCompletionsAPI(
        model=MODEL, base_url=f"{URL}/v1/completions", tokenizer_backend=None, max_retries=1, max_gen_toks=16, **settings
    )
    api.tokenizer, api.tokenizer_backend, api.tokenized_requests = Bytes(), "tiktoken", True
    return api


def greedy(prompt, tokens):
    """The tokens that the server produces at temperature 0."""
    body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": 1}
    answer = requests.post(f"{URL}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    answer.raise_for_status()
    texts = answer.json()["choices"][0]["logprobs"]["tokens"]
    return [int(text[-2:], 16) if text.startswith("bytes:") else ord(text) for text in texts]


seen("lm-eval", True, importlib.metadata.version("lm_eval"))
for name, api in [("one at a time", model()), ("batches of 3", model(batch_size=3)), ("4 at a time", model(num_concurrent=4))]:
    contexts = [b"fn main() {", b"The quick brown fox", b"17,0.25,-3"]
    best = [greedy(context, 6) for context in contexts]
    other = [[(token + 1) % 256 for token in tokens] for tokens in best]
    asked = [(("", ""), list(c), tokens) for c, tokens in [*zip(contexts, best), *zip(contexts, other)]]
    results = api._loglikelihood_tokens(asked)
    seen(f"{name}: greedy continuations are greedy", [is_greedy for _, is_greedy in results[:3]] == [True] * 3)
    seen(f"{name}: others are not", [is_greedy for _, is_greedy in results[3:]] == [False] * 3)
    scores = [score for score, _ in results]
    sane = all(math.isfinite(score) and score < 0 for score in scores)
    seen(f"{name}: the likelier continuation scores higher", sane and all(a > b for a, b in zip(scores, scores[3:])), scores)

api = model()
choices = [Instance("loglikelihood", {}, ("Question: 2+2?\nAnswer:", text), i) for i, text in enumerate([" 4", " five"])]
scored = api.loglikelihood(choices)
seen("loglikelihood of texts", len(scored) == 2 and all(math.isfinite(score) for score, _ in scored), scored)
rolling = api.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("let x = 1;",), 0)])
seen("loglikelihood_rolling", math.isfinite(rolling[0]) and rolling[0] < 0, rolling)

settings = {"until": ["\n", ";"], "max_gen_toks": 24, "do_sample": False}
asked = [Instance("generate_until", {}, (text, dict(settings)), i) for i, text in enumerate(["let x", "fn f"])]
texts = api.generate_until(asked)
seen("generate_until gives no stop sequence", not any(stop in text for text in texts for stop in ["\n", ";"]), texts)
