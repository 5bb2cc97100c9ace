"""OpenAI's own client: completions, streams, log-probabilities, n, seeds, stops, and errors as typed exceptions."""

import openai

from seen import CONTEXT, KEY, MODEL, URL, seen

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)


def complete(**settings):
    return client.completions.create(**{"model": MODEL, "max_tokens": 12, **settings})


def raises(kind, what, **settings):
    try:
        complete(**settings)
    except openai.APIStatusError as error:
        seen(f"{what} raises {kind.__name__}", type(error) is kind, error.message)
        return error
    seen(f"{what} raises {kind.__name__}", False, "nothing was raised")


seen("the client", True, openai.__version__)
seen("models.list", [model.id for model in client.models.list()] == [MODEL])
seen("models.retrieve", client.models.retrieve(MODEL).id == MODEL)

whole = complete(prompt="fn main", temperature=0, logprobs=2)
choice, usage = whole.choices[0], whole.usage
seen("a completion", choice.finish_reason == "length" and whole.object == "text_completion", repr(choice.text))
seen("its usage", (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 12, 19), usage)
scores = choice.logprobs
seen("log-probabilities of 12 tokens", len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 12)
tops = zip(scores.token_logprobs, scores.top_logprobs)
seen("the token chosen greedily is the likeliest, digit by digit", all(own == max(top.values()) for own, top in tops))
seen("offsets begin after the prompt or at 0, ascending", scores.text_offset == sorted(scores.text_offset))

stream = complete(prompt="fn main", temperature=0, stream=True, stream_options={"include_usage": True})
parts = list(stream)
text = "".join(part.choices[0].text for part in parts if part.choices)
seen("a stream adds up to the completion", text == choice.text, f"{len(parts)} parts")
seen("a stream's usage", parts[-1].usage == usage, parts[-1].usage)

echo = complete(prompt="let x", max_tokens=1, temperature=0, echo=True, logprobs=1).choices[0]
seen("echo", echo.text.startswith("let x") and len(echo.logprobs.tokens) == 6, repr(echo.text))
seen("the first token of an echo has no log-probability", echo.logprobs.token_logprobs[0] is None)

several = complete(prompt=["a", "b"], n=3, temperature=1)
seen("n=3 of two prompts", [c.index for c in several.choices] == list(range(6)), [c.text for c in several.choices])
seen("without a seed they differ", len({c.text for c in several.choices[:3]}) > 1)
free = [complete(prompt="a", temperature=1).choices[0].text for _ in range(3)]
seen("without a seed requests differ", len(set(free)) > 1, free)
fixed = [complete(prompt="a", temperature=1, seed=7).choices[0].text for _ in range(2)]
seen("with a seed they are the same", fixed[0] == fixed[1], repr(fixed[0]))

long = complete(prompt="stop", max_tokens=60, temperature=1, seed=3).choices[0].text
letter = next(c for c in long[1:] if c.isascii())
cut = complete(prompt="stop", max_tokens=60, temperature=1, seed=3, stop=[letter]).choices[0]
seen("text ends before a stop sequence", (cut.text, cut.finish_reason) == (long[: long.index(letter)], "stop"), repr(letter))

error = raises(openai.BadRequestError, "temperature=3", prompt="a", temperature=3)
seen("it names its parameter", error.param == "temperature")
error = raises(openai.BadRequestError, "a prompt that is too long", prompt="x" * (CONTEXT + 1))
seen("its code", error.code == "context_length_exceeded")
error = raises(openai.BadRequestError, "a prompt too long with its new tokens", prompt="x" * (CONTEXT - 4))
seen("its code", error.code == "context_length_exceeded")
error = raises(openai.NotFoundError, "another model", prompt="a", model="another")
seen("its code", error.code == "model_not_found")
client.api_key = "wrong"
error = raises(openai.AuthenticationError, "a wrong key", prompt="a")
seen("its code", error.code == "invalid_api_key")
client.api_key = KEY
try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    seen("chat raises", False)
except openai.APIStatusError as error:
    seen("chat is answered with a hint", "/v1/completions" in error.message, f"{error.status_code} {error.message}")

tagged = complete(prompt="a", extra_headers={"x-request-id": "of-a-client-1"})
seen("a request's id comes back", tagged._request_id == "of-a-client-1")
own = complete(prompt="a")._request_id
seen("a request without one gets one", bool(own), own)
