"""Damage builds in every way, and check that the next `build` and `verify` succeed.

    python tools/fault_campaign.py                  # the stand-in compilers of tests/fakes: minutes
    python tools/fault_campaign.py --real           # nvcc and CMake: hours
    python tools/fault_campaign.py --count 5 --seed 7 --only kills names

Each trial starts from a good build, does one harm, and runs `build`. A trial passes if no command ends by a signal or
with a traceback, if the build after it can be loaded and has exactly the kernels that were asked for, and if nothing is
left over. Figures go to standard output; the exit status is 1 if a trial fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from file_damage import HARMS, NAMES, PARTS, parts_of

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("--space", "trtllm", "--mode", "cs", "--cluster", "1x1x1", "--target", "cutlass")
REAL_KERNELS = ("--mode", "fgs", "--cluster", "1x1x1")
FIRST, SECOND = ("--cta", "64x16x64"), ("--cta", "64x16x64", "--cta", "64x32x64")
REAL_FIRST, REAL_SECOND = ("--cta", "64x8x128"), ("--cta", "64x8x128", "--cta", "128x8x64")
SECONDS = 600
CHECK = """
import json, sys
from pathlib import Path
from w4a16gen.runtime.artifact import load_build
from w4a16gen.runtime.library import Library
from w4a16gen.verify.static import source_violations
build = load_build(Path(sys.argv[1]))
violations = source_violations(build.manifest.asked, build.sources)
print(json.dumps([[str(config) for config in Library(build).configs()], violations]))
"""


@dataclass
class Tally:
    """Trials of one kind of harm."""

    kind: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, label: str, problems: list[str]) -> None:
        """Count a trial; it passed if there are no problems."""
        self.trials += 1
        self.failures += [f"{self.kind}, {label}: {problem}" for problem in problems]


class Campaign:
    """The builds of one campaign, below one folder."""

    def __init__(self, root: Path, *, real: bool, count: int, seed: int) -> None:
        """Take the folder, the compilers, the number of trials of a kind, and the seed of everything random."""
        self.root = root
        self.count = count
        self.random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.environment.pop("W4A16GEN_BUILD_DIR", None)
        kernels = REAL_KERNELS if real else KERNELS
        self.first = (*kernels, *(REAL_FIRST if real else FIRST))
        self.second = (*kernels, *(REAL_SECOND if real else SECOND))
        self.real = real
        if not real:
            self._use_stand_ins()
        self.good = root / "good"
        self.good.mkdir()
        started = time.monotonic()
        problems = self.build(self.good, self.first)
        self.build_seconds = time.monotonic() - started
        if problems:
            raise SystemExit("the first build failed: " + "; ".join(problems))

    def _use_stand_ins(self) -> None:
        """Put scripts for the stand-ins of nvcc and CMake into the environment."""
        nvcc_include = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _FIND_INCLUDE], capture_output=True, text=True, check=True, env=self.environment
        ).stdout.strip()
        tools = self.root / "tools"
        tools.mkdir()
        for program in ("nvcc", "cmake"):
            script = tools / program
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fakes/{program}.py" "$@"\n')
            script.chmod(0o755)
            self.environment[f"W4A16GEN_{program.upper()}"] = str(script)
        cache = Path(self.environment.get("FAKE_CACHE", self.root / "cache"))
        cache.mkdir(exist_ok=True)
        self.environment |= {"FAKE_CACHE": str(cache), "FAKE_NVCC_INCLUDE": nvcc_include}

    def command(self, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run w4a16gen in a folder."""
        return subprocess.run(  # noqa: S603
            [sys.executable, "-m", "w4a16gen", *arguments],
            cwd=folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SECONDS,
        )

    def build(self, folder: Path, kernels: tuple[str, ...]) -> list[str]:
        """Run build and verify; return what is wrong with how they ended."""
        done = self.command(folder, "build", "--json", "-j", "2", *kernels)
        problems = ended_badly("build", done)
        if done.returncode != 0:
            return problems or [f"build ended with {done.returncode}: {done.stderr.strip()[-300:]}"]
        expected = sorted(json.loads(done.stdout)["kernels"])
        checked = subprocess.run(  # noqa: S603
            [sys.executable, "-c", CHECK, str(folder / "build")],
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        if checked.returncode != 0:
            return [*problems, f"the build cannot be used: {checked.stderr.strip()[-300:]}"]
        names, violations = json.loads(checked.stdout)
        if sorted(names) != expected:
            problems.append(f"the build has {sorted(names)}")
        problems += violations
        if self.real:
            verified = self.command(folder, "verify")
            problems += ended_badly("verify", verified)
            problems += [f"verify: {verified.stderr.strip()[-300:]}"] if verified.returncode else []
        left = [path for path in (folder / "build").rglob(".*") if path.name != ".lock"]
        left += list((folder / "generated").glob(".*"))
        return problems + [f"left over: {path}" for path in left]

    @contextmanager
    def copy(self, name: str = "trial") -> Iterator[Path]:
        """Copy the good build."""
        folder = self.root / "trials" / name
        shutil.copytree(self.good, folder, symlinks=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def kills(self) -> Tally:
        """Kill a build of more kernels at a random moment, and build again."""
        tally = Tally("kills")
        for number in range(self.count):
            with self.copy() as folder:
                moment = self.random.uniform(0, 1.2 * self.build_seconds)
                with subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "w4a16gen", "build", "-j", "2", *self.second],
                    cwd=folder,
                    env=self.environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                ) as process:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(moment)
                    process.send_signal(signal.SIGKILL)
                usable = self.command(folder, "list", "--built")
                problems = ended_badly("list", usable)
                problems += [] if usable.returncode == 0 else ["the earlier build was lost"]
                tally.check(f"{number} after {moment:.2f} s", problems + self.build(folder, self.second))
        return tally

    def damages(self) -> Tally:
        """Damage one file of the build, look at it, and build again."""
        tally = Tally("damages")
        for part in PARTS:
            for number in range(self.count):
                with self.copy() as folder:
                    path = self.random.choice(parts_of(folder, part))
                    name, harm = self.random.choice(HARMS)
                    harm(path, self.random)
                    problems = ended_badly("list", self.command(folder, "list", "--built"))
                    kernels = self.random.choice((self.first, self.second))
                    tally.check(f"{part} {number}, {name}", problems + self.build(folder, kernels))
        return tally

    def names(self) -> Tally:
        """Build in folders of odd names."""
        tally = Tally("names")
        for name in NAMES[: max(1, self.count)]:
            parent = self.root / "trials" / "names"
            folder = parent / name
            shutil.copytree(self.good, folder)
            shutil.rmtree(folder / "build")
            problems = self.build(folder, self.first)
            others = [path.name for path in parent.iterdir() if path.name != name]
            problems += [f"the name was run: {others}"] if others else []
            tally.check(repr(name), problems)
            shutil.rmtree(parent)
        return tally

    def moves(self) -> Tally:
        """Move and copy a build, and build again where it is now."""
        tally = Tally("moves")
        for number in range(min(self.count, 10)):
            with self.copy() as folder:
                target = folder.with_name(f"elsewhere {number}")
                (shutil.move if number % 2 else shutil.copytree)(str(folder), str(target))
                kernels = self.random.choice((self.first, self.second))
                tally.check(str(number), self.build(target, kernels))
                shutil.rmtree(target)
        return tally

    def clocks(self) -> Tally:
        """Set every file's time to the future or the past, as if the clock had been changed, and build again."""
        tally = Tally("clocks")
        for number in range(min(self.count, 10)):
            with self.copy() as folder:
                moved = time.time() + (1 if number % 2 else -1) * self.random.uniform(1e3, 1e8)
                for path in folder.rglob("*"):
                    os.utime(path, (moved, moved), follow_symlinks=False)
                kernels = self.random.choice((self.first, self.second))
                tally.check(str(number), self.build(folder, kernels))
        return tally

    def full_disks(self) -> Tally:
        """Build on a file system of a few megabytes until it is full; then with room. Needs root."""
        tally = Tally("full disks")
        if os.geteuid() != 0:
            return tally
        for number in range(min(self.count, 10)):
            mount = self.root / "small"
            mount.mkdir(exist_ok=True)
            kilobytes = self.random.randrange(100, 20_000)
            small = subprocess.run(  # noqa: S603
                ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(mount)],  # noqa: S607
                check=False,
            )
            if small.returncode:
                return tally
            try:
                done = self.command(mount, "build", *self.second)
                problems = ended_badly("build", done)
                if done.returncode and "No space left" not in " ".join(done.stderr.split()):
                    problems.append(f"not reported as a full disk: {done.stderr.strip()[-300:]}")
                subprocess.run(["mount", "-o", "remount,size=500m", str(mount)], check=True)  # noqa: S603, S607
                tally.check(f"{number} of {kilobytes} kB", problems + self.build(mount, self.second))
            finally:
                subprocess.run(["umount", "-l", str(mount)], check=True)  # noqa: S603, S607
        return tally

    def pairs(self) -> Tally:
        """Run two builds at once in one folder."""
        tally = Tally("two at once")
        for number in range(min(self.count, 10)):
            with self.copy() as folder:
                command = [sys.executable, "-m", "w4a16gen", "build", *self.second]
                both = [
                    subprocess.Popen(  # noqa: S603
                        command, cwd=folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                    )
                    for _ in range(2)
                ]
                texts = [process.communicate()[1].decode() for process in both]
                codes = sorted(process.returncode for process in both)
                problems = [] if codes in ([0, 0], [0, 1]) else [f"ended with {codes}"]
                if codes == [0, 1] and "another process is building" not in " ".join(" ".join(texts).split()):
                    problems.append(f"not told as a lock: {texts}")
                tally.check(str(number), problems + self.build(folder, self.second))
        return tally


_FIND_INCLUDE = """
import os
os.environ.pop("W4A16GEN_NVCC", None)
from w4a16gen.build import toolchain
print(toolchain.find_cuda_include(toolchain.find_nvcc()))
"""


def ended_badly(name: str, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return whether a command ended by a signal or with a traceback."""
    if done.returncode < 0 or "Traceback" in done.stderr:
        return [f"{name} ended with {done.returncode}: {done.stderr.strip()[-400:]}"]
    return []


KINDS = ("kills", "damages", "names", "moves", "clocks", "full_disks", "pairs")


def main() -> int:
    """Run the campaign and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="use nvcc and CMake, not the stand-ins of the tests")
    parser.add_argument("--count", type=int, default=50, help="trials of each kind, and of each part that is damaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="w4a16gen-campaign-") as name:
        campaign = Campaign(Path(name), real=options.real, count=options.count, seed=options.seed)
        for kind in options.only:
            started = time.monotonic()
            tally: Tally = getattr(campaign, kind)()
            seconds = time.monotonic() - started
            print(f"{tally.kind}: {tally.trials} trials, {len(tally.failures)} failures, {seconds:.0f} s", flush=True)
            failures += tally.failures
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
