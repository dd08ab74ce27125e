"""Compare a 4-bit model with its dequantized self: greedy tokens, times per token, and memory while loading.

    python tools/serve_model.py SmolLM2-135M-Instruct.Q4_1.gguf --json result.json

It loads a checkpoint or a GGUF file with `w4a16gen.integrations.transformers.from_pretrained`, and beside it the same
model with its 4-bit layers dequantized to the same dtype. It needs the extra `transformers`; on a GPU also a build of
native kernels, which W4A16GEN_BUILD_DIR names. See docs/guides/transformers.md.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from w4a16gen.integrations.transformers import from_pretrained

PROMPTS = (
    "The capital of France is",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain in simple words why the sky is blue during the day and red in the evening.",
    "def quicksort(values):",
    "The three most important inventions of the twentieth century are",
)
SPARE = 8
"""Places of a cache beyond the tokens that are needed."""


@dataclass
class Difference:
    """A place where two models choose different tokens after the same text.

    Attributes:
        place: the number of the new token, from 0.
        dense: the dense model's token.
        packed: the 4-bit model's token.
        dense_gap: by how much the dense model prefers its own, in units of its logits.
        packed_gap: by how much the 4-bit model prefers its own.
    """

    place: int
    dense: int
    packed: int
    dense_gap: float
    packed_gap: float


@dataclass
class Comparison:
    """The greedy continuations of one prompt.

    Attributes:
        prompt: the prompt.
        tokens: new tokens.
        same_after_same_text: tokens that agree when both models read the dense model's text.
        same_alone: tokens that agree when each model reads its own text.
        first_difference: the first place where texts of their own differ, or None.
        largest_error: largest difference of logits after the same text.
        differences: where tokens differ after the same text.
    """

    prompt: str
    tokens: int
    same_after_same_text: int
    same_alone: int
    first_difference: int | None
    largest_error: float
    differences: list[Difference] = field(default_factory=list)


class Decoder:
    """A model that reads a prompt, and then one token after the other into a cache of a fixed size."""

    def __init__(self, model: Any, prompt: Any, tokens: int) -> None:
        """Read the prompt, int64 [1, length]."""
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens + SPARE)
        self._cache = {"cache" if "cache" in names else "past_key_values": self.cache, "use_cache": True}
        self.logits = self.read(prompt)
        self.places = prompt.shape[1]

    def read(self, ids: Any) -> Any:
        """Return the logits after some tokens, fp32 [vocabulary]."""
        return self.model(input_ids=ids, **self._cache).logits[0, -1].float()

    def step(self, ids: Any) -> Any:
        """Return the next token, int64 [1, 1]; the unit that is timed."""
        return self.model(input_ids=ids, **self._cache).logits[:, -1:].argmax(-1)

    def rewind(self) -> None:
        """Forget all tokens but those of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.places)


def continuation(decoder: Decoder, tokens: int, given: Sequence[int] | None = None) -> tuple[list[int], list[Any]]:
    """Return the greedy tokens, and the logits that they come from, on the CPU.

    Args:
        decoder: a model that has read the prompt.
        tokens: how many.
        given: the tokens to read instead of its own.
    """
    chosen, logits = [], []
    for place in range(tokens):
        logits.append(decoder.logits.cpu())
        chosen.append(int(decoder.logits.argmax()))
        following = chosen[-1] if given is None else given[place]
        decoder.logits = decoder.read(torch.tensor([[following]], device=decoder.model.device))
    return chosen, logits


def compare(dense: Any, packed: Any, prompt: str, ids: Any, tokens: int) -> Comparison:
    """Return how the continuations of two models agree."""
    expected, of_dense = continuation(Decoder(dense, ids, tokens), tokens)
    alone, _ = continuation(Decoder(packed, ids, tokens), tokens)
    forced, of_packed = continuation(Decoder(packed, ids, tokens), tokens, expected)
    differences = [
        Difference(place, a, b, float(left[a] - left[b]), float(right[b] - right[a]))
        for place, (a, b, left, right) in enumerate(zip(expected, forced, of_dense, of_packed, strict=True))
        if a != b
    ]
    return Comparison(
        prompt,
        tokens,
        tokens - len(differences),
        sum(a == b for a, b in zip(expected, alone, strict=True)),
        next((place for place, (a, b) in enumerate(zip(expected, alone, strict=True)) if a != b), None),
        max(float((left - right).abs().max()) for left, right in zip(of_dense, of_packed, strict=True)),
        differences,
    )


def microseconds(decoder: Decoder, step: Callable[[], object], count: int) -> float:
    """Return the time of one step, the least of three rounds."""
    times = []
    for _ in range(3):
        decoder.rewind()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return 1e6 * min(times)


def _fed_back(step: Callable[[Any], Any], token: Any) -> None:
    """Put the next token in the place of the last one."""
    token.copy_(step(token))


def captured(decoder: Decoder, step: Callable[[Any], Any], token: Any) -> Callable[[], object]:
    """Return the replay of a CUDA graph of a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(token)
    torch.cuda.current_stream().wait_stream(stream)
    decoder.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(step(token))

    def replayed() -> None:
        graph.replay()

    return replayed


def times_of(model: Any, ids: Any, count: int, *, compiles: bool) -> dict[str, float | str]:
    """Return microseconds per token: eager, compiled, and in graphs of both; or why there is no time."""
    found: dict[str, float | str] = {}
    for name in ("eager", "compiled") if compiles else ("eager",):
        decoder = Decoder(model, ids, count)
        token = ids[:, -1:].clone()
        step: Any = torch.compile(decoder.step, fullgraph=True, dynamic=False) if name == "compiled" else decoder.step
        try:
            for _ in range(3):
                step(token)
            found[name] = microseconds(decoder, partial(_fed_back, step, token), count)
            if model.device.type == "cuda":
                decoder.rewind()
                found[f"{name} in a graph"] = microseconds(decoder, captured(decoder, step, token), count)
        except Exception as error:  # noqa: BLE001 - one way less, and the others are still measured
            found[f"{name}, failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        torch._dynamo.reset()  # noqa: SLF001
    return found


def load(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the 4-bit model, and what loading it took."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    if on_gpu:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(arguments.device)
    before = torch.cuda.memory_allocated(arguments.device) if on_gpu else 0
    start = time.perf_counter()
    model = from_pretrained(
        arguments.checkpoint, device=arguments.device, dtype=arguments.dtype, config=arguments.config
    )
    report = model.w4a16gen_report
    facts: dict[str, Any] = {
        "seconds": time.perf_counter() - start,
        "layers": str(report),
        "dense": dict(report.dense),
        "packed_bytes": report.packed_bytes,
        "dense_bytes": report.dense_bytes,
    }
    if on_gpu:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(arguments.device) - before
        facts["peak_over_model"] = facts["peak_bytes"] / (report.packed_bytes + report.dense_bytes)
    return model, facts


def tokenizer_of(checkpoint: Path) -> Any:
    """Return the tokenizer of a folder or a GGUF file."""
    if checkpoint.is_dir():
        return transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    return transformers.AutoTokenizer.from_pretrained(str(checkpoint.parent), gguf_file=checkpoint.name)


def prompts_of(arguments: argparse.Namespace) -> dict[str, list[int]]:
    """Return the prompts with their tokens; lines of numbers are tokens themselves."""
    lines = arguments.prompts.read_text().splitlines() if arguments.prompts else list(PROMPTS)
    texts = [line for line in lines if line.strip()]
    if all(text.replace(" ", "").isdigit() for text in texts):
        return {text: [int(number) for number in text.split()] for text in texts}
    tokenizer = tokenizer_of(arguments.checkpoint)
    return {text: tokenizer(text).input_ids for text in texts}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="a folder of a 4-bit checkpoint, or a GGUF file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", help="of activations and dense weights, in both models")
    parser.add_argument("--config", type=Path, help="a folder with config.json, for files that lack it")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens per prompt")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one per line, as text or as token numbers")
    parser.add_argument("--steps", type=int, default=100, help="tokens per timed round")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args(arguments)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results."""
    packed, loading = load(arguments)
    print(json.dumps(loading, indent=1), flush=True)
    dense = from_pretrained(
        arguments.checkpoint, device=arguments.device, dtype=arguments.dtype, config=arguments.config
    ).dequantize(packed.dtype)
    gc.collect()
    prompts = {text: torch.tensor([ids], device=packed.device) for text, ids in prompts_of(arguments).items()}
    comparisons = []
    for text, ids in prompts.items():
        comparisons.append(compare(dense, packed, text, ids, arguments.tokens))
        print(json.dumps(asdict(comparisons[-1]), indent=1), flush=True)
    total = sum(comparison.tokens for comparison in comparisons)
    ids = next(iter(prompts.values()))
    times = {
        name: times_of(model, ids, arguments.steps, compiles=not arguments.no_compile)
        for name, model in (("4-bit", packed), ("dense", dense))
    }
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(packed.device) if packed.device.type == "cuda" else "cpu",
        "dtype": str(packed.dtype),
        "loading": loading,
        "same_after_same_text": sum(comparison.same_after_same_text for comparison in comparisons) / total,
        "same_alone": sum(comparison.same_alone for comparison in comparisons) / total,
        "microseconds_per_token": times,
        "prompts": [asdict(comparison) for comparison in comparisons],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parsed(arguments)
    with torch.inference_mode():
        results = measured(options)
    text = json.dumps(results, indent=1)
    if options.json:
        options.json.write_text(f"{text}\n")
    print(json.dumps({name: value for name, value in results.items() if name != "prompts"}, indent=1))


if __name__ == "__main__":
    main()
