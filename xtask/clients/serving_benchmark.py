"""vLLM's serving benchmark, in the form that sglang's package ships it as one file: streamed completions, its own measurements.

The file is the installed package's; only `transformers` is stood in for, by a tokenizer whose tokens are bytes.
"""

import importlib.util
import json
import os
import sys
import tempfile
import types

from seen import KEY, MODEL, URL, seen

os.environ["OPENAI_API_KEY"] = KEY


class AutoTokenizer:
    chat_template = None

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    def encode(self, text, add_special_tokens=False):
        return list(text.encode())


stand_in = types.ModuleType("transformers")
for name in ["AutoTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast"]:
    setattr(stand_in, name, AutoTokenizer)
sys.modules["transformers"] = stand_in

package = importlib.util.find_spec("sglang").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("bench_serving", os.path.join(package, "bench_serving.py"))
bench = importlib.util.module_from_spec(spec)
sys.modules["bench_serving"] = bench
spec.loader.exec_module(bench)

REQUESTS, TOKENS = 24, 8
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "prompts.json")
    with open(path, "w") as file:
        turn = lambda text: {"value": text}
        json.dump([{"conversations": [turn(f"prompt {i} " * (1 + i % 9)), turn("x" * TOKENS)]} for i in range(REQUESTS)], file)
    arguments = types.SimpleNamespace(
        backend="vllm", base_url=URL, host=None, port=None, model=MODEL, tokenizer=None, dataset_name="sharegpt",
        dataset_path=path, num_prompts=REQUESTS, sharegpt_output_len=None, sharegpt_context_len=None, request_rate=20.0,
        max_concurrency=8, seed=1, multi=False, disable_tqdm=True, disable_stream=False, disable_ignore_eos=False,
        return_logprob=False, extra_request_body=None, lora_name=None, profile=False,
        output_file=os.path.join(folder, "result.jsonl"), output_details=False, apply_chat_template=False,
        random_input_len=0, random_output_len=0, random_range_ratio=0.0,
    )
    result = bench.run_benchmark(arguments)

seen("requests answered", result["completed"] == REQUESTS, f"{result['completed']} of {REQUESTS}")
seen("tokens produced", result["total_output_tokens"] == REQUESTS * TOKENS, result["total_output_tokens"])
seen("time to the first token", 0 < result["mean_ttft_ms"] < 60_000, f"{result['mean_ttft_ms']:.1f} ms")
seen("throughput", result["output_throughput"] > 0, f"{result['output_throughput']:.1f} tokens/s")
