"""Instantiations written for TensorRT-LLM's source tree: what is in them, and that headers of every age take them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes.generator import GOLDEN, INCLUDE
from fakes.launchers import AGES, DESCENDANT, HEADER, write_header
from fakes.runner import Runner

from w4a16gen import QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import audit
from w4a16gen.integrations.tensorrt_llm.emit import SCHEMA, emit_trtllm
from w4a16gen.integrations.tensorrt_llm.launcher import Launcher, read_launcher
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space

COMPILER = shutil.which("g++")
INSTANTIATION = re.compile(r"^template .*?;$", re.DOTALL | re.MULTILINE)
ONE_MODE = [config for config in enumerate_space("trtllm") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY]
ORT_HEADER = "contrib_ops/cuda/llm/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"


def tokens(text: str) -> str:
    """Split C++ at white space and around punctuation."""
    return " ".join(re.findall(r"[\w:]+|[^\s\w:]", text))


def compiled(source: Path, include: Path) -> list[str]:
    """Compile a source as C++ and return the launchers that it instantiates."""
    assert COMPILER is not None
    program = source.with_suffix(".o")
    command = [COMPILER, "-std=c++17", "-Wall", "-Werror", "-x", "c++", "-I", str(include), "-c", str(source), "-o"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(["nm", "-C", str(program)], capture_output=True, text=True, check=True)  # noqa: S603, S607
    return re.findall(r" W void ([\w:]+)::sm90_generic_mixed_gemm_kernelLauncher<", symbols.stdout)


def test_what_is_emitted_is_what_the_real_generator_writes_token_by_token(tmp_path: Path) -> None:
    namespace = "tensorrt_llm::kernels::cutlass_kernels"
    emission = emit_trtllm(enumerate_space("trtllm"), tmp_path, launcher=Launcher(namespace=namespace))
    found = set()
    for path in emission.files:
        text = path.read_text()
        assert text.startswith(INCLUDE)
        assert text.count("#include") == 1
        found |= {tokens(part).replace(f"{namespace}::", "") for part in INSTANTIATION.findall(text)}
    assert found == {tokens(line) for line in GOLDEN}
    assert len(found) == 63


def test_files_for_every_release_instantiate_the_same(tmp_path: Path) -> None:
    any_release = emit_trtllm(enumerate_space("trtllm"), tmp_path / "any")
    one_release = emit_trtllm(enumerate_space("trtllm"), tmp_path / "one", launcher=Launcher(namespace="a::b"))
    for first, second in zip(any_release.files, one_release.files, strict=True):
        written = first.read_text().replace("tensorrt_llm::w4a16gen::launchers::", "a::b::")
        assert INSTANTIATION.findall(written) == INSTANTIATION.findall(second.read_text())


@pytest.mark.skipif(COMPILER is None, reason="this machine has no g++")
@pytest.mark.parametrize("age", AGES)
def test_one_emission_compiles_with_the_headers_of_every_age(tmp_path: Path, age: str) -> None:
    write_header(tmp_path / "include", AGES[age])
    for path, kernels in emit_trtllm(ONE_MODE, tmp_path / "out").files.items():
        found = compiled(path, tmp_path / "include")
        assert len(found) == len(kernels)
        namespace = "cutlass_kernels" if "old" in age or "0.20" in age else "cutlass_kernels_oss"
        assert {name.split("::")[-1] for name in found} == {namespace}


@pytest.mark.skipif(COMPILER is None, reason="this machine has no g++")
@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("mixed_input", [False, True])
def test_a_source_tree_says_where_its_launcher_is(tmp_path: Path, age: str, mixed_input: bool) -> None:
    write_header(tmp_path / "tree" / "cpp", AGES[age], mixed_input=mixed_input)
    generator = tmp_path / "tree" / "cpp" / "python" / "generate_kernels.py"
    generator.parent.mkdir()
    addition = (
        '    kernel_sched += "MixedInput"\n' if mixed_input else '    # kernel_sched += "MixedInput", until 3.6\n'
    )
    generator.write_text(f"if is_mixed:\n{addition}")
    launcher = read_launcher(tmp_path / "tree")
    assert (launcher.include, launcher.root, launcher.mixed_input) == (HEADER, "tensorrt_llm", mixed_input)
    assert launcher.namespace is not None
    emission = emit_trtllm(ONE_MODE[:2], tmp_path / "out", launcher=launcher)
    (path,) = emission.files
    assert len(compiled(path, tmp_path / "tree" / "cpp")) == 2


@pytest.mark.skipif(COMPILER is None, reason="this machine has no g++")
def test_files_for_onnxruntime_name_its_header_and_namespaces(tmp_path: Path) -> None:
    write_header(tmp_path / "tree", DESCENDANT, header=ORT_HEADER)
    launcher = read_launcher(tmp_path / "tree")
    assert launcher == Launcher(ORT_HEADER, "onnxruntime::llm::kernels::cutlass_kernels", "onnxruntime::llm")
    emission = emit_trtllm(enumerate_space("trtllm"), tmp_path / "out", launcher=launcher)
    assert compiled(next(iter(emission.files)), tmp_path / "tree") == ["onnxruntime::llm::kernels::cutlass_kernels"] * 7
    assert audit(tmp_path / "out").ok


def test_a_launcher_behind_a_macro_that_opens_kernels_too_is_found(tmp_path: Path) -> None:
    write_header(tmp_path / "in", "macro_opens_kernels.inl", header="fpA_intB_launcher_sm90.inl")
    assert read_launcher(tmp_path / "in").namespace == "tensorrt_llm::kernels::cutlass_kernels_oss"
    assert read_launcher(tmp_path / "in").include == "fpA_intB_launcher_sm90.inl"


def test_a_source_tree_without_one_launcher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"no fpA_intB_launcher_sm90\.inl under"):
        read_launcher(tmp_path)
    write_header(tmp_path / "a", AGES["1.0"])
    path = write_header(tmp_path / "b", AGES["1.0"])
    with pytest.raises(InvalidValueError, match="more than one"):
        read_launcher(tmp_path)
    path.write_text("// sm90_generic_mixed_gemm_kernelLauncher(\n")
    with pytest.raises(InvalidValueError, match="does not define sm90"):
        read_launcher(tmp_path / "b")


@pytest.mark.parametrize("name", ["a b", "a::", "x; int y", "", "a::b{}", "ä"])
def test_namespaces_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match="is not a namespace"):
        Launcher(namespace=name)
    with pytest.raises(InvalidValueError, match="is not a header's path"):
        Launcher(include=f'{name}"\n')


def test_files_hold_one_mode_and_schedule_and_the_manifest_says_which_kernel_is_where(tmp_path: Path) -> None:
    emission = emit_trtllm(enumerate_space("trtllm"), tmp_path)
    assert sorted(map(len, emission.files.values())) == [7] * 9
    for kernels in emission.files.values():
        assert len({(config.mode, config.schedule) for config in kernels}) == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA == "w4a16gen.trtllm/1"
    assert {kernel["name"] for kernel in manifest["kernels"]} == {config.name for config in enumerate_space("trtllm")}
    for kernel in manifest["kernels"]:
        assert f"// {kernel['name']}\n" in (tmp_path / kernel["file"]).read_text()
    assert emit_trtllm(enumerate_space("trtllm"), tmp_path).written == []


def test_only_files_that_an_earlier_call_wrote_are_removed(tmp_path: Path) -> None:
    emit_trtllm(enumerate_space("trtllm"), tmp_path)
    mine = tmp_path / "w4a16_trtllm_fgs_mine.generated.cu"
    mine.write_text("int x;\n")
    edited = tmp_path / "w4a16_trtllm_cs_pingpong_1.generated.cu"
    edited.write_text(edited.read_text() + "// mine\n")
    kept = emit_trtllm(ONE_MODE, tmp_path)
    assert (kept.removed, len(kept.stale)) == ([], 6)
    emission = emit_trtllm(ONE_MODE, tmp_path, remove_stale=True)
    assert len(emission.removed) == 5
    assert emission.stale == [edited]
    assert mine.read_text() == "int x;\n"
    assert len(list(tmp_path.glob("*.cu"))) == 3 + 2


@pytest.mark.parametrize(
    "manifest",
    [
        "{}", "[]", "", "x" * 10, '{"schema": "w4a16gen.build/2", "files": {}}', "[" * 100_000,
        '{"schema": "w4a16gen.trtllm/1", "files": {"../../victim": ["0"]}}',
        '{"schema": "w4a16gen.trtllm/1", "files": {"/victim": ["0"]}}',
        '{"schema": "w4a16gen.trtllm/1", "files": [1]}', '{"schema": "w4a16gen.trtllm/1"}',
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_folder_with_another_manifest_is_refused_and_stays_as_it_is(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "victim").write_text("")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(InvalidValueError, match=r"manifest\.json is not a manifest of w4a16gen\.trtllm/1"):
        emit_trtllm(ONE_MODE, folder, remove_stale=True)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert (tmp_path / "victim").exists()


def test_files_in_the_way_are_not_overwritten(tmp_path: Path) -> None:
    name = "w4a16_trtllm_fgs_pingpong_1.generated.cu"
    for number, place in enumerate(("file", "folder", "link")):
        folder = tmp_path / str(number)
        folder.mkdir()
        if place == "file":
            (folder / name).write_text("int x;\n")
        elif place == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to(tmp_path / "victim")
        with pytest.raises(InvalidValueError, match="was not written by an earlier call"):
            emit_trtllm(ONE_MODE, folder)
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(InvalidValueError, match="is not a folder"):
        emit_trtllm(ONE_MODE, tmp_path / "0" / name)


def test_a_call_that_was_killed_between_files_can_be_repeated(tmp_path: Path) -> None:
    emit_trtllm(ONE_MODE, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    first, second, third = sorted(tmp_path.glob("*.cu"))
    first.unlink()
    second.write_text("older\n")
    manifest["files"][second.name].append("3c7fe25b80ac10c8dc9ac03b79b76c8bf1b0c6a0f0d9dcf8f1ad9a5a8dd3c36a")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidValueError, match=second.name):
        emit_trtllm(ONE_MODE, tmp_path)
    second.unlink()
    assert emit_trtllm(ONE_MODE, tmp_path).written == [first, second]
    assert third.exists()


def test_kernels_that_tensorrt_llm_does_not_have_are_refused(tmp_path: Path) -> None:
    native = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warpgroups4_persistent")
    with pytest.raises(InvalidValueError, match="TensorRT-LLM generates no such kernel"):
        emit_trtllm([native], tmp_path)


def test_emitting_for_tensorrt_llm_from_the_command_line(cli: Runner) -> None:
    done = cli.invoke(args=["emit", "--target", "trtllm", "--output", "out"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\t7\n") == 9
    assert "63 kernels of space trtllm in 9 files: 9 files written" in " ".join(done.stderr.split())
    write_header(Path("tree"), AGES["1.0"])
    source = ["--trtllm-source", "tree", "--trtllm-namespace", "a::b", "--mixed-input-schedules"]
    few = cli.invoke(args=["emit", "--target", "trtllm", *source, "--output", "few", "--json"])
    for file in json.loads(few.stdout)["files"]:
        assert "template void a::b::sm90_" in Path(file["path"]).read_text()
        assert "MixedInput, cutlass::epilogue" in Path(file["path"]).read_text()
    for option in (["--trtllm-source", "tree"], ["--trtllm-namespace", "a"], ["--mixed-input-schedules"]):
        alone = cli.invoke(args=["emit", *option])
        assert alone.exit_code == 2
        assert f"{option[0]} needs --target trtllm" in alone.stderr
