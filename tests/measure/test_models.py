"""Models' layers as problems: known shapes, every division of every model, and what cannot be divided."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen import Problem
from w4a16gen.cli import main
from w4a16gen.cli.services import Services
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.problem import why_cannot_run
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import bench
from w4a16gen.measure.models import MODELS, Model, model_problems
from w4a16gen.measure.results import Comparison, Timing

REFUSED = {("qwen2.5-7b", 8), ("qwen2.5-72b", 2), ("qwen2.5-72b", 4), ("qwen2.5-72b", 8)}
KERNEL = next(config for config in enumerate_space("default") if config.mode.is_grouped)


def shapes(name: str, tensor_parallel: int) -> list[tuple[int, int]]:
    return [(problem.n, problem.k) for _, problem in model_problems(name, [1], tensor_parallel=tensor_parallel)]


def test_known_models_have_their_known_layers() -> None:
    assert shapes("llama-3-8b", 1) == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert shapes("llama-3-70b", 8) == [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)]
    assert shapes("qwen3-32b", 2) == [(5120, 5120), (5120, 4096), (25600, 5120), (5120, 12800)]
    assert shapes("qwen2.5-7b", 4) == [(1152, 3584), (3584, 896), (9472, 3584), (3584, 4736)]


def test_a_key_and_value_head_that_there_are_too_few_of_is_on_several_gpus() -> None:
    model = Model(1024, 4096, num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=1)
    assert model.layers(4)[0] == ("qkv", (8 + 2) * 128, 1024)
    assert model.layers(8)[0] == ("qkv", (4 + 2) * 128, 1024)


def test_names_say_the_layer_and_the_division() -> None:
    named = model_problems("mixtral-8x7b", [3, 5], tensor_parallel=2, group_size=64)
    assert named[0] == ("mixtral-8x7b qkv / 2", Problem(3, 3072, 4096, 64))
    assert named[-1] == ("mixtral-8x7b down / 2", Problem(5, 4096, 7168, 64))
    assert len(named) == 8


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_what_can_be_divided_can_run(name: str, tensor_parallel: int) -> None:
    if (name, tensor_parallel) in REFUSED:
        with pytest.raises(InvalidValueError, match=r"cannot be divided among|choose another group size or fewer GPUs"):
            model_problems(name, [1], tensor_parallel=tensor_parallel)
        return
    for _, problem in model_problems(name, [1, 100], tensor_parallel=tensor_parallel):
        assert why_cannot_run(KERNEL, problem) is None


def test_what_cannot_be_divided_says_why() -> None:
    with pytest.raises(InvalidValueError, match="28 query heads and 4 key and value heads cannot be divided among 8"):
        model_problems("qwen2.5-7b", [1], tensor_parallel=8)
    with pytest.raises(
        InvalidValueError, match=r"layer down of qwen2\.5-72b on 2 GPUs has k of 14784, which groups of 128"
    ):
        model_problems("qwen2.5-72b", [1], tensor_parallel=2)
    with pytest.raises(InvalidValueError, match="model 'gpt-2' is not one of llama-3-8b"):
        model_problems("gpt-2", [1])


def test_bench_times_the_layers_of_models(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []

    def compare(_library: object, problem: Problem, _mode: object, **_: object) -> Comparison:
        asked.append(problem)
        return Comparison(problem, KERNEL.mode, {KERNEL.name: 1.0}, 0, [Timing(KERNEL.name, [1.0])])

    cli.services = Services(load=lambda _folder: FakeLibrary([KERNEL]))
    monkeypatch.setattr(bench, "tensor_peak", lambda _library, _device: None)
    monkeypatch.setattr(bench, "compare", compare)
    arguments = "bench --problem 1x64x64,64 --model llama-3-8b/2,64 --tokens 2 --tokens 4"
    done = cli.invoke(main, arguments.split())
    assert done.exit_code == 0, done.output
    assert asked[0] == Problem(1, 64, 64, 64)
    assert asked[1:] == [
        problem for _, problem in model_problems("llama-3-8b", [2, 4], tensor_parallel=2, group_size=64)
    ]
    assert "(llama-3-8b gate_up / 2): 1.00 us" in done.stderr


@pytest.mark.parametrize(
    "text", ["", "gpt-2", "llama-3-8b/", "llama-3-8b/x", "llama-3-8b/0", "llama-3-8b,0", "llama-3-8b,64/2"]
)
def test_a_model_that_is_none_is_refused(cli: CliRunner, text: str) -> None:
    done = cli.invoke(main, ["bench", "--model", text])
    assert done.exit_code == 2
    assert "the models are llama-3-8b, llama-3-70b" in done.stderr.replace("\n", " ")
