"""C++ chooses what Python chooses: sdk/chooser.h, compiled for the host, and the file that it reads."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.devices import H100, H100_PCIE, H200, H800
from fakes.library import build_of
from paths import CPP, ROOT

from w4a16gen import Epilogue, Problem, QuantMode
from w4a16gen.choose import choice_file as choice_file_module
from w4a16gen.choose import chooser as chooser_module
from w4a16gen.choose.choice_file import choice_text, fnv1a
from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.cost_model import CostModel, Rates, default_cost_model
from w4a16gen.choose.overrides import KERNELS_VARIABLE, kernels_of_environment
from w4a16gen.choose.timing_table import TABLE, Measured, add_times, one_time
from w4a16gen.errors import InvalidValueError, NotBuiltError, W4A16Error
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.device import HOPPER, Device
from w4a16gen.kernels.epilogue import why_not_gated
from w4a16gen.kernels.problem import why_cannot_run
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.measure.models import MODELS

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("C++ chooser")]

DEFAULT = enumerate_space("default")
HASHES = build_of(DEFAULT).content_hashes
FGS = QuantMode.FINEGRAINED_SCALE_ONLY
NAMED = (("H20", 78), ("H20-3e", 78), ("H100 NVL", 132), ("GH200 480GB", 132), ("H300", 100), ("H1000", 7))
DEVICES = (
    *(H100, None, H200, H800, H100_PCIE),
    *(replace(H100, sm_count=sms) for sms in (1, 16, 26, 60)),
    *(Device(0, f"NVIDIA {name}", HOPPER, sms) for name, sms in NAMED),
)
Question = tuple[QuantMode, Problem, Device | None]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the chooser with strict warnings."""
    path = tmp_path_factory.mktemp("chooser") / "choose_kernels"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    source = CPP / "choose_kernels.cpp"
    subprocess.run(["g++", *flags, f"-I{ROOT / 'w4a16gen' / 'cuda'}", str(source), "-o", str(path)], check=True)  # noqa: S603, S607
    return path


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test set the variable that names kernels, which Python reads once per process."""
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    kernels_of_environment.cache_clear()
    yield
    kernels_of_environment.cache_clear()


def ask_cpp(program: Path, choice_file: Path, questions: Sequence[Question]) -> list[str]:
    """Return the program's answers."""
    lines = []
    for mode, problem, device in questions:
        gpu = "" if device is None else f" {device.sm_count} {device.name}"
        lines.append(f"{mode} {problem.m} {problem.n} {problem.k} {problem.group_size}{gpu}\n")
    command = [str(program), str(choice_file)]
    asked = subprocess.run(command, input="".join(lines), capture_output=True, text=True, check=True, env=os.environ)  # noqa: S603
    return asked.stdout.splitlines()


def ask_python(chooser: Chooser, question: Question) -> tuple[str, float, str]:
    """Return Python's answer for a weight that native kernels read."""
    mode, problem, device = question
    choice = chooser.choose(problem, mode, device=device, target=Target.NATIVE)
    return choice.kernel.name, choice.microseconds or 0.0, choice.source.value


def assert_same(
    program: Path, folder: Path, questions: Sequence[Question], table: Path, hashes: Mapping[KernelConfig, str] = HASHES
) -> list[str]:
    """Check that C++ gives Python's answers; return the sources of the choices."""
    choice_file = folder / "choice.txt"
    choice_file.write_text(choice_text(hashes, table))
    chooser = Chooser(hashes, table)
    sources = []
    answers = ask_cpp(program, choice_file, questions)
    for question, answer in zip(questions, answers, strict=True):
        name, microseconds, source = ask_python(chooser, question)
        kernel, time, cpp_source = answer.split(" ")
        assert (kernel, cpp_source) == (name, source), question
        assert float(time) == pytest.approx(microseconds, rel=1e-12), question
        sources.append(source)
    return sources


def random_questions(count: int, seed: int) -> list[Question]:
    """Return random problems in all modes on all kinds of GPU; some are of the layers of models."""
    rng = random.Random(seed)  # noqa: S311
    layers = sorted({(n, k) for model in MODELS.values() for _, n, k in model.layers(1)})
    questions: list[Question] = []
    for _ in range(count):
        mode = rng.choice(list(QuantMode))
        n, k = rng.choice(layers) if rng.random() < 0.3 else (8 * rng.randint(1, 4096), 64 * rng.randint(1, 512))
        m = rng.choice([0, 1, rng.randint(1, 64), round(2 ** rng.uniform(0, 20))])
        group = rng.choice([size for size in (32, 64, 128, 256, k) if k % size == 0]) if mode.is_grouped else k
        questions.append((mode, Problem(m, n, k, group), rng.choice(DEVICES)))
    return questions


def test_cpp_and_python_agree_on_random_problems(program: Path, tmp_path: Path) -> None:
    sources = assert_same(program, tmp_path, random_questions(2000, seed=1), tmp_path / TABLE)
    assert sources == ["estimate"] * 2000


@pytest.mark.parametrize(
    "shape",
    [
        "cta64x8x128_cluster1x1x1_warps8_streamk",  # two CTAs share an SM
        "cta128x128x128_cluster1x2x1_warpgroups2_streamk",
        "cta128x144x128_cluster1x1x1_warpgroups2_streamk",
        "cta128x144x128_cluster2x1x1_warpgroups2_streamk",
    ],
)
def test_cpp_and_python_agree_on_what_stream_k_reads_apart(program: Path, tmp_path: Path, shape: str) -> None:
    config = KernelConfig.parse(f"w4a16_sm90_native_fgs_{shape}")
    k = 32384  # L2 keeps the activations of none
    sizes = [(3195, 1408), (2700, 1408), (1024, 192), (1056, 128), (144 * 12, 128 * 11), (3195, 384)]
    problems = [
        *(Problem(m, n, k, 128) for m, n in sizes),
        Problem(200, 192, 128, 128),  # one k block
        Problem(200, 4608, 8 * k, 128),  # one token tile of some
        Problem(1021, 192, 23360, 64),  # more than L2 keeps with the padding of K only
    ]
    questions = [(FGS, problem, H100) for problem in problems]
    assert_same(program, tmp_path, questions, tmp_path / TABLE, build_of([config]).content_hashes)


def test_cpp_and_python_agree_where_the_build_has_a_tuning_table(program: Path, tmp_path: Path) -> None:
    rng = random.Random(2)  # noqa: S311
    table = tmp_path / TABLE
    questions = random_questions(300, seed=3)
    for mode, problem, _ in questions[:60]:
        for kernel in rng.sample([config for config in DEFAULT if config.mode is mode], 3):
            if problem.m > 0 and why_cannot_run(kernel, problem) is None:
                stale = rng.random() < 0.2
                measured = Measured(float(rng.randint(5, 9)), "hash of other code" if stale else HASHES[kernel])
                add_times(table, one_time(H100, problem, kernel, measured))
    on_h100 = [(mode, problem, rng.choice([H100, None])) for mode, problem, _ in questions]
    sources = assert_same(program, tmp_path, on_h100, table)
    assert sources.count("tuning_table") > 20
    choice_file = tmp_path / "choice.txt"
    for question in on_h100[:20]:
        elsewhere = (question[0], question[1], H200)
        (answer,) = ask_cpp(program, choice_file, [elsewhere])
        assert "tuning_table" not in answer, "the table is of another GPU"


def test_the_nearest_time_counts_then_the_one_at_more_tokens_on_this_gpu_alone(program: Path, tmp_path: Path) -> None:
    table = tmp_path / TABLE
    fewer, more = [config for config in DEFAULT if config.mode is FGS][:2]
    for m, kernel in ((10, fewer), (14, more)):
        add_times(table, one_time(H100, Problem(m, 512, 1024, 128), kernel, Measured(5.0, HASHES[kernel])))
    expected = {9: fewer, 11: fewer, 12: more, 13: more, 16: more}
    questions: list[Question] = [(FGS, Problem(m, 512, 1024, 128), H100) for m in expected]
    assert set(assert_same(program, tmp_path, questions, table)) == {"tuning_table"}
    chooser = Chooser(HASHES, table)
    assert [ask_python(chooser, question)[0] for question in questions] == [config.name for config in expected.values()]
    other: list[Question] = [(FGS, Problem(12, 512, 1024, 128), replace(H100, sm_count=114))]
    with pytest.warns(RuntimeWarning, match="with 132 SMs, not of"):
        assert assert_same(program, tmp_path, other, table) == ["estimate"]


def test_cpp_honours_the_environment_variable_as_python_does(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = random_questions(50, seed=4)
    named = [config for config in DEFAULT if config.mode is not QuantMode.PER_COLUMN_SCALE_ONLY][3::7]
    cutlass = enumerate_space("trtllm")[0]
    monkeypatch.setenv(KERNELS_VARIABLE, f" {cutlass.name}, {named[0].name} ,,\t{named[-1].name}")
    sources = assert_same(program, tmp_path, questions, tmp_path / TABLE)
    assert sources.count("override") == sum(
        mode in {config.mode for config in (named[0], named[-1])} for mode, _, _ in questions
    )


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "w4a16_sm90_native_fgs_cta064x8x128_cluster1x1x1_warps8_persistent",
        "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_persistent_",
        "w4a16_sm90_native_fgs_cta64x8x128_cluster0x1x1_warps8_persistent",
        "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps9_persistent",
        "w4a16_sm90_marlin_fgs_cta64x8x128_cluster1x1x1_warps8_persistent",
        "w4a16_sm90_native_fgx_cta64x8x128_cluster1x1x1_warps8_persistent",
        "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warpgroups2_streamk",
    ],
)
def test_cpp_refuses_the_names_that_python_refuses(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    choice_file = tmp_path / "choice.txt"
    choice_file.write_text(choice_text(HASHES, tmp_path / TABLE))
    question = (FGS, Problem(16, 4096, 4096, 128), H100)
    monkeypatch.setenv(KERNELS_VARIABLE, text)
    with pytest.raises(W4A16Error) as refused:
        ask_python(Chooser(HASHES, tmp_path / TABLE), question)
    (answer,) = ask_cpp(program, choice_file, [question])
    if isinstance(refused.value, NotBuiltError):
        assert answer == f"error {text}, which {KERNELS_VARIABLE} names, is not in the build"
    else:
        assert answer.startswith(f"error '{text}' is not a kernel name such as ")


@pytest.mark.parametrize(
    "end", ["persistent_gated", "persistent_elementwise", "streamk_gated", "grouped", "grouped_gated"]
)
def test_cpp_refuses_kernels_that_no_target_has_in_the_words_of_python(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    choice_file = tmp_path / "choice.txt"
    choice_file.write_text(choice_text(HASHES, tmp_path / TABLE))
    question = (FGS, Problem(16, 4096, 4096, 128), H100)
    monkeypatch.setenv(KERNELS_VARIABLE, f"w4a16_sm90_cutlass_fgs_cta128x16x64_cluster1x1x1_cooperative_{end}")
    with pytest.raises(InvalidValueError, match="only native kernels") as refused:
        ask_python(Chooser(HASHES, tmp_path / TABLE), question)
    sentence = str(refused.value).removeprefix(f"{KERNELS_VARIABLE}: ")
    assert ask_cpp(program, choice_file, [question]) == [f"error {sentence}"]


@pytest.mark.parametrize("sizes", ["-1 64 128 128", "1 0 128 128", "1 64 0 128", "1 64 128 0", "1 64 -128 -128"])
def test_sizes_of_no_problem_are_refused_and_end_no_process(program: Path, tmp_path: Path, sizes: str) -> None:
    choice_file = tmp_path / "choice.txt"
    choice_file.write_text(choice_text(HASHES, tmp_path / TABLE))
    asked = subprocess.run(  # noqa: S603
        [str(program), str(choice_file)], input=f"fgs {sizes}\n", capture_output=True, text=True, check=True
    )
    m, n, k, group_size = sizes.split(" ")
    assert asked.stdout == (
        f"error m of {m} must be 0 or more, and n of {n}, k of {k} and group size {group_size} must be above 0\n"
    )


def test_a_mode_without_native_kernels_has_no_choice(program: Path, tmp_path: Path) -> None:
    choice_file = tmp_path / "choice.txt"
    fgs = {config: "hash" for config in DEFAULT if config.mode is FGS}
    choice_file.write_text(choice_text(fgs, tmp_path / TABLE))
    question = (QuantMode.PER_COLUMN_SCALE_ONLY, Problem(16, 4096, 4096, 4096), H100)
    assert ask_cpp(program, choice_file, [question]) == ["error the build holds no native kernel of mode cs"]
    choice_file.write_text(choice_text({}, tmp_path / TABLE))
    (answer,) = ask_cpp(program, choice_file, [(FGS, Problem(16, 4096, 4096, 128), H100)])
    assert answer == "error the build holds no native kernel of mode fgs"


def test_a_build_without_plain_kernels_names_the_command(program: Path, tmp_path: Path) -> None:
    choice_file = tmp_path / "choice.txt"
    gated = dict.fromkeys(with_epilogues(DEFAULT, [Epilogue.GATED]), "hash")
    choice_file.write_text(choice_text(gated, tmp_path / TABLE))
    problem = Problem(16, 4096, 4096, 128)
    text = "the build holds no kernel of mode fgs without an epilogue: run `w4a16gen build`"
    assert ask_cpp(program, choice_file, [(FGS, problem, H100)]) == [f"error {text}"]
    with pytest.raises(NotBuiltError) as refused:
        Chooser(gated, tmp_path / TABLE).choose(problem, FGS, device=H100)
    assert str(refused.value) == text


def test_grouped_kernels_are_never_chosen(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice_file = tmp_path / "choice.txt"
    grouped = dict.fromkeys(enumerate_space("experts"), "hash")
    plain = choice_text(HASHES, tmp_path / TABLE)
    assert choice_text({**HASHES, **grouped}, tmp_path / TABLE) == plain
    question = (FGS, Problem(16, 4096, 4096, 128), H100)
    choice_file.write_text(plain)
    (chosen,) = ask_cpp(program, choice_file, [question])
    lines = [line for line in plain.splitlines() if not line.startswith("end ")]
    name = chosen.split(" ")[0]
    choice_file.write_text(with_end([line.replace(name, name.replace("persistent", "grouped")) for line in lines]))
    (other,) = ask_cpp(program, choice_file, [question])
    assert other.split(" ")[0] not in {name, name.replace("persistent", "grouped")}
    every = [line.replace("_persistent", "_grouped").replace("_streamk", "_grouped") for line in lines]
    choice_file.write_text(with_end(every))
    assert ask_cpp(program, choice_file, [question]) == ["error the build holds no native kernel of mode fgs"]
    named = next(config.name for config in grouped if config.mode is FGS)
    choice_file.write_text(plain)
    monkeypatch.setenv(KERNELS_VARIABLE, named)
    (answer,) = ask_cpp(program, choice_file, [question])
    sentence = f"{named} computes grouped products: name it in the call of grouped_gemm"
    assert answer == f"error {sentence}"
    with pytest.raises(W4A16Error, match=sentence):
        ask_python(Chooser(HASHES, tmp_path / TABLE), question)


@pytest.mark.skipif(shutil.which("localedef") is None, reason="localedef makes the locale")
def test_a_locale_with_a_decimal_comma_changes_nothing(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = subprocess.run(  # noqa: S603
        ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip("this machine has no sources of locales")
    choice_file = tmp_path / "choice.txt"
    choice_file.write_text(choice_text(HASHES, tmp_path / TABLE))
    question = (FGS, Problem(16, 4096, 4096, 128), H100)
    (expected,) = ask_cpp(program, choice_file, [question])
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    (answer,) = ask_cpp(program, choice_file, [question])
    assert answer == expected.replace(".", ","), "the program prints by its locale, and chooses alike"


def with_end(lines: Sequence[str]) -> str:
    """Return a file with the right last line."""
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}end {len(lines)} {fnv1a(text.encode()):016x}\n"


def refusal_of(program: Path, choice_file: Path) -> str:
    """Return what the program says of a file, and check that it ends without a signal."""
    asked = subprocess.run([str(program), str(choice_file)], input="", capture_output=True, text=True, check=False)  # noqa: S603
    assert asked.returncode in {0, 1}
    return asked.stderr


def test_a_damaged_file_is_refused_in_one_sentence(program: Path, tmp_path: Path) -> None:
    choice_file = tmp_path / "choice.txt"
    whole = choice_text(HASHES, tmp_path / TABLE).encode()
    rng = random.Random(5)  # noqa: S311
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    for _ in range(20):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    damaged += [b"", b"\n", b"\n\n", whole + b"x", whole[1:], bytes(1000)]
    for data in damaged:
        choice_file.write_bytes(data)
        assert "is damaged" in refusal_of(program, choice_file)
        assert "run `w4a16gen export --prefix` again" in refusal_of(program, choice_file)
    choice_file.unlink()
    assert "cannot be read: run `w4a16gen export --prefix` again" in refusal_of(program, choice_file)
    choice_file.mkdir()
    assert "run `w4a16gen export --prefix` again" in refusal_of(program, choice_file)


def test_of_equal_estimates_the_first_kernel_counts(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = dict.fromkeys(default_cost_model().rates, Rates(1000.0, 0.0, 0.0, 0.0, 1.0))
    alike = CostModel(default_cost_model().constants, rates)
    for module in (chooser_module, choice_file_module):
        monkeypatch.setattr(module, "default_cost_model", lambda: alike)
    for m in (1, 9, 40):
        question = (FGS, Problem(m, 4096, 4096, 128), None)
        assert_same(program, tmp_path, [question], tmp_path / TABLE)
        fitting = [config for config in DEFAULT if config.mode is FGS and config.cta.tokens < 2 * max(m, 8)]
        assert ask_python(Chooser(HASHES, tmp_path / TABLE), question)[0] == min(fitting).name


def test_every_line_is_checked(program: Path, tmp_path: Path) -> None:
    choice_file = tmp_path / "choice.txt"
    add_times(tmp_path / TABLE, one_time(H100, Problem(1, 64, 128, 128), DEFAULT[0], Measured(1.0, HASHES[DEFAULT[0]])))
    lines = choice_text(HASHES, tmp_path / TABLE).splitlines()[:-1]
    first: dict[str, int] = {}
    for place, line in enumerate(lines):
        first.setdefault(line.split(" ")[0], place)
    assert {"constant", "h100", "card", "kernel", "tuned_on", "tuned"} <= first.keys()
    choice_file.write_text(with_end(lines))
    assert refusal_of(program, choice_file) == ""
    for word, place in first.items():
        fields = lines[place].split(" ")
        changes = [[*fields[:at], value, *fields[at + 1 :]] for at in range(len(fields)) for value in ("x", "-1", "")]
        changes.append(fields[:1])
        # These lines end with a GPU's name, which may be any text.
        name_from = {"h100": 4, "card": 4, "tuned_on": 2}.get(word)
        if name_from is None:
            changes += [fields[:-1], [*fields, "1"]]
        for change in changes:
            if change != fields and (name_from is None or change[:name_from] != fields[:name_from]):
                choice_file.write_text(with_end([*lines[:place], " ".join(change), *lines[place + 1 :]]))
                assert "is damaged" in refusal_of(program, choice_file), change
    choice_file.write_text(with_end([line for line in lines if not line.startswith("h100")]))
    assert "does not describe the H100" in refusal_of(program, choice_file)


def test_the_text_depends_on_the_build_only(tmp_path: Path) -> None:
    kernels = list(HASHES)
    random.Random(6).shuffle(kernels)  # noqa: S311
    text = choice_text(HASHES, tmp_path / TABLE)
    assert choice_text({config: HASHES[config] for config in kernels}, tmp_path / TABLE) == text
    assert text.isascii()
    assert "cutlass" not in choice_text(build_of(enumerate_space("trtllm")).content_hashes, tmp_path / TABLE)


@pytest.mark.filterwarnings("ignore:.* is of NVIDIA H100:RuntimeWarning")
def test_cpp_and_python_agree_on_kernels_with_epilogues(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = build_of(with_epilogues(DEFAULT, list(Epilogue))).content_hashes
    table, file = tmp_path / TABLE, tmp_path / "choice.txt"
    measured = Problem(32, 4096, 4096, 128)
    plain_fgs = [config for config in DEFAULT if config.mode is FGS]
    slow = replace(plain_fgs[0], epilogue=Epilogue.GATED)
    add_times(table, one_time(H100, measured, slow, Measured(1.0, hashes[slow])))
    file.write_text(choice_text(hashes, table))
    chooser = Chooser(hashes, table)
    questions = [(FGS, measured, H100), *random_questions(100, 5)]
    sources = set()
    for epilogue in Epilogue:
        answers = ask_cpp(program, file, [(f"{mode}+{epilogue}", *rest) for mode, *rest in questions])  # type: ignore[misc]
        for (mode, problem, device), answer in zip(questions, answers, strict=True):
            if epilogue is Epilogue.GATED and (reason := why_not_gated(problem.n)):
                assert answer == f"error {reason}"
                continue
            choice = chooser.choose(problem, mode, device=device, target=Target.NATIVE, epilogue=epilogue)
            assert answer.split(" ")[::2] == [choice.kernel.name, choice.source.value]
            assert choice.kernel.epilogue is epilogue
            sources.add((epilogue, choice.source.value))
    assert (Epilogue.GATED, "tuning_table") in sources
    assert (Epilogue.NONE, "tuning_table") not in sources
    plain, gated = plain_fgs[1].name, f"{plain_fgs[2].name}_gated"
    monkeypatch.setenv(KERNELS_VARIABLE, f"{plain},{gated}")
    (one, other) = ask_cpp(program, file, [("fgs+none", measured, H100), ("fgs+gated", measured, H100)])  # type: ignore[list-item]
    assert (one, other) == (f"{plain} 0 override", f"{gated} 0 override")


def test_cpp_names_the_command_that_builds_an_epilogue(program: Path, tmp_path: Path) -> None:
    (tmp_path / "choice.txt").write_text(choice_text(HASHES, tmp_path / TABLE))
    question = ("fgs+gated", Problem(1, 4096, 4096, 128), None)
    (answer,) = ask_cpp(program, tmp_path / "choice.txt", [question])  # type: ignore[list-item]
    with pytest.raises(NotBuiltError) as raised:
        Chooser(HASHES, tmp_path / TABLE).choose(question[1], FGS, device=None, epilogue=Epilogue.GATED)
    assert answer == f"error {raised.value}"
    assert answer.endswith("run `w4a16gen build --epilogue none --epilogue gated`")
