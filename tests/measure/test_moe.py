"""Layers of experts on the CPU: the entrants, the parts, what is left out, and what the command says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes.devices import H100
from fakes.library import FakeLibrary
from fakes.mixtures import DIVIDED, MODE, PLAIN, TINY, WITH_ZEROS, HostLibrary, few_layers, measured
from fakes.runner import Runner
from json_shapes import MOE, SCHEMAS, check

from w4a16gen import Epilogue, MissingToolError, NoHopperGpuError, NotBuiltError, QuantMode
from w4a16gen.choose.cards import H100 as CARD
from w4a16gen.choose.experts import Routing, choose_pair
from w4a16gen.cli.moe_bench import MOE_TOKENS
from w4a16gen.cli.services import Services
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import with_epilogues
from w4a16gen.measure import moe
from w4a16gen.measure.models import MIXTURES, Mixture
from w4a16gen.measure.moe import MoeBench, MoePoint, MoeTiming
from w4a16gen.measure.moe_entrants import DENSE, OWN, Drawn, OwnLayers, Work
from w4a16gen.measure.probes import READS, cold_read_microseconds
from w4a16gen.measure.results import Timing
from w4a16gen.runtime.expert_plan import MOE_PARTS

torch = pytest.importorskip("torch")

GATED = with_epilogues(PLAIN, [Epilogue.NONE, Epilogue.GATED])


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    few_layers(monkeypatch)


@pytest.mark.parametrize("mode", [MODE, WITH_ZEROS], ids=str)
@pytest.mark.parametrize("mixture", [TINY, DIVIDED], ids=["whole", "divided"])
@pytest.mark.parametrize("configs", [PLAIN, GATED], ids=["plain", "gated"])
def test_all_entrants_compute_the_layer_and_are_timed(
    mode: QuantMode, mixture: Mixture, configs: Sequence[KernelConfig]
) -> None:
    library = HostLibrary(configs)
    (point,) = measured(library, mixture, mode=mode).points
    assert {timing.name for timing in point.timings} == {OWN, DENSE}
    assert not point.left_out
    assert library.gated == {configs is GATED}
    own, dense = point.timing(OWN), point.timing(DENSE)
    assert own is not None
    assert dense is not None
    assert 0 < own.error < 0.003
    assert own.error < dense.error < 0.02
    assert len(own.microseconds.isolated) == 2
    assert own.median == pytest.approx(2000 / 4)
    assert [kernel.epilogue for kernel in point.kernels] == [
        Epilogue.GATED if configs is GATED else Epilogue.NONE,
        Epilogue.NONE,
    ]
    assert point.floor is None  # of a GPU only


def test_each_part_is_timed_by_itself_after_a_whole_layer() -> None:
    for configs in (PLAIN, GATED):
        library = HostLibrary(configs)
        (point,) = measured(library).points
        names = [name for name in MOE_PARTS if name != "activation" or configs is PLAIN]
        assert list(point.parts) == names
        assert all(microseconds == pytest.approx(500) for microseconds in point.parts.values())
        alone = [list(parts) for parts in library.parts if len(parts) == 1]
        assert {name for (name,) in alone} == set(names)
        assert alone == [list(parts) for parts in library.parts[-len(alone) :]]


def test_loads_are_those_of_the_routings() -> None:
    few, many = measured(HostLibrary(), tokens=(1, 64)).points
    assert (few.rows, few.experts_hit) == (2, 2)
    assert (many.rows, many.experts_hit) == (128, 6)
    assert many.weight_bytes == 3 * few.weight_bytes
    assert few.flops == 2 * 2 * 3 * 128 * 256
    (divided,) = measured(HostLibrary(), DIVIDED, (64,)).points
    assert divided.experts_hit == 4
    assert 100 < divided.rows < 156  # half of 128 tokens' routes


def test_experts_of_a_token_differ_and_weights_sum_up() -> None:
    work = Work(Drawn(torch, TINY, MODE, torch.device("cpu")), 50, 3, 2)
    assert len(work.routings) == 2
    assert work.routing(2) is work.routing(0)
    for routing in work.routings:
        assert (routing.ids[:, 0] != routing.ids[:, 1]).all()
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(50))
    assert not torch.equal(work.routings[0].ids, work.routings[1].ids)


def test_launches_take_layers_in_memory_of_their_own() -> None:
    drawn = Drawn(torch, TINY, MODE, torch.device("cpu"))
    own = OwnLayers(HostLibrary(), drawn)  # type: ignore[arg-type]
    assert own.copies(1) > own.copies(64) == 1
    memory = own.parts_of_memory(4096, 1)
    assert len({array.data_ptr() for array in memory}) == own.copies(1)
    assert all(array.nbytes == 4096 for array in memory)
    assert all(torch.equal(array, memory[0]) for array in memory)


def test_a_wrong_result_of_ours_is_an_error() -> None:
    library = HostLibrary()
    library.factor = 1.1
    told: list[str] = []
    found = measured(library, tell=told.append)
    (point,) = found.points
    assert [timing.name for timing in point.timings] == [DENSE]
    assert "what rounding explains" in found.wrong[3]
    assert told == [
        f"tiny, 3 tokens: {OWN} is left out: {found.wrong[3]}",
        f"tiny, 3 tokens: {DENSE} {point.timings[0].median:.1f} us",
    ]
    assert not point.parts


def test_what_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    library = HostLibrary()
    library.failure = RuntimeError("no memory")
    (point,) = measured(library).points
    assert point.timings == []
    assert point.left_out == {
        OWN: "RuntimeError: no memory",
        DENSE: "UnsupportedProblemError: torch has no grouped_mm: 2.8 and newer have it",
    }


def test_a_build_without_grouped_kernels_names_the_command() -> None:
    with pytest.raises(NotBuiltError, match=r"mode fgs: run `w4a16gen build --space default --space experts`"):
        measured(HostLibrary([]), machine=None)


def test_torch_and_a_gpu_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "find_torch", lambda: None)
    with pytest.raises(MissingToolError, match="bench --moe runs layers in torch's graphs: pip install torch"):
        measured(HostLibrary(), machine=None)
    with pytest.raises(NoHopperGpuError):
        measured(FakeLibrary(PLAIN, devices=[]), machine=None)


def test_the_floor_reads_copies_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(PLAIN)
    copies = [library.to_device(np.zeros(size, np.uint8)) for size in (32, 64)]
    read: list[int] = []

    def reads(_pointer: int, nbytes: int, *_: object) -> tuple[int, str]:
        read.append(nbytes)
        return 0, ""

    monkeypatch.setattr(library.bindings.library, "probe_read", reads)
    assert cold_read_microseconds(library, copies, 0) > 0
    assert read == [32, 64] * (READS // 2)


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_kernels_can_compute_every_model(mixture: Mixture, mode: QuantMode) -> None:
    assert mixture.experts * mixture.gpus == mixture.num_experts
    gate_up, down = mixture.problems(mode)
    routing = Routing(16, mixture.num_experts_per_tok, mixture.experts, mixture.num_experts)
    for epilogue in (Epilogue.NONE, Epilogue.GATED):
        assert choose_pair(GATED, mode, (gate_up, epilogue), down, routing, CARD)


class Command:
    """Runs `bench --moe` with times that are given."""

    def __init__(self, cli: Runner, left_out: dict[str, str]) -> None:
        self.models: list[str] = []
        self.tokens: list[int] = []
        self.humming: bool | None = None

        def run(
            _library: Any, model: tuple[str, Mixture], tokens: Sequence[int], mode: QuantMode, rounds: int, **more: Any
        ) -> MoeBench:
            self.models.append(model[0])
            self.humming = more["humming"]
            self.tokens = list(tokens)
            kernel = PLAIN[0]
            parts = {"routing": 5.0, "gate_up": 50.0, "activation": 2.0, "down": 30.0, "combining": 3.0}
            timings = [
                MoeTiming(OWN, Timing(OWN, [100.0] * (rounds - 1) + [110.0]), 0.001),
                MoeTiming(DENSE, Timing(DENSE, [400.0] * rounds), 0.01),
            ]
            points = [
                MoePoint(count, 8.0 * count, 7.5, 12_340_000, 1e9, (kernel, kernel), timings, parts, left_out, 80.0)
                for count in tokens
            ]
            return MoeBench(model[0], model[1], H100, mode, points)

        library = FakeLibrary(PLAIN)
        cli.services = Services(load=lambda _folder: library, moe_bench=run)


def test_the_command_shows_a_table_for_each_model(cli: Runner) -> None:
    command = Command(cli, {})
    done = cli.run("bench --moe tiny --moe kimi-k2-ep8 --tokens 1 --tokens 8 --wide")
    assert done.exit_code == 0, done.output
    assert command.models == ["tiny", "kimi-k2-ep8"]
    assert command.tokens == [1, 8]
    assert "kimi-k2-ep8: 48 experts of 7168 x 2048, on one of 8 GPUs, 8 for each token" in done.output
    rows = [line.split() for line in done.output.splitlines() if OWN in line.split()]
    name = PLAIN[0].shape_name
    numbers = ["100.0", "100.0", "110.0", "0.80", "10", "7.5", "12.3", "80.0", "5.0", "50.0", "2.0", "30.0", "3.0"]
    assert rows[1] == ["8", OWN, *numbers, name, name]
    dense = next(line.split() for line in done.output.splitlines() if DENSE in line)
    assert dense == ["1", DENSE, "400.0", "400.0", "400.0", "0.20", "2"]


def test_the_command_prints_an_object(cli: Runner) -> None:
    command = Command(cli, {"other": "not there"})
    done = cli.run("bench --moe tiny --json")
    assert done.exit_code == 0, done.output
    assert command.tokens == list(MOE_TOKENS)
    found = json.loads(done.stdout)
    del found["schema"]
    check(found["moe"], [MOE], "moe")
    assert found.keys() == SCHEMAS["bench"].keys()
    assert found["moe"][0]["model"]["name"] == "tiny"
    first = found["moe"][0]["points"][0]
    assert first["timings"][0]["least_us"] == 100
    assert first["timings"][0]["most_us"] == 110
    assert first["left_out"] == {"other": "not there"}


@pytest.mark.parametrize(
    ("options", "wanted"), [("", None), ("--no-rivals", False), ("--rivals", True), ("--rival humming", True)]
)
def test_the_user_may_say_whether_humming_takes_part(options: str, wanted: bool | None, cli: Runner) -> None:
    command = Command(cli, {})
    assert cli.run(f"bench --moe tiny --tokens 4 {options}").exit_code == 0
    assert command.humming is wanted


def test_a_wrong_result_ends_the_command_with_an_error(cli: Runner) -> None:
    Command(cli, {OWN: "its error is 3 times"})
    done = cli.run("bench --moe tiny --tokens 4")
    assert done.exit_code == 1
    assert "tiny, 4 tokens: its error is 3 times" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--moe tiny --random 3", "--moe times layers of experts: drop --random"),
        ("--moe tiny --step llama-3-8b --prefill 2", "drop --step and --prefill"),
        ("--moe tiny --problem 1x64x128", "drop --problem"),
        ("--moe tiny --report out", "--moe times the kernels that calls get: drop --report"),
        ("--moe tiny --finalists 2", "drop --finalists"),
        ("--moe tiny --epilogue gated", "drop --epilogue"),
        ("--moe tiny --rival turbomind", "--moe times no rival but humming: drop --rival turbomind"),
        ("--moe tiny --rival humming --no-rivals", "--rival times a rival, and --no-rivals none"),
        ("--moe tiny --ray auto", "--moe runs on this machine: drop --ray"),
        ("--moe gpt", "'gpt' is not one of qwen3-30b-a3b, mixtral-8x7b"),
    ],
)
def test_options_that_do_not_go_together_are_refused(cli: Runner, options: str, message: str) -> None:
    command = Command(cli, {})
    done = cli.run(f"bench {options}")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert command.models == []
