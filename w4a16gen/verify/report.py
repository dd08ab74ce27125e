"""The report on both kinds of proof: JSON, a table and a page."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen.kernels.config import KernelConfig
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library
from w4a16gen.verify import epilogues, experts, launch_chains, numeric, random_problems, static
from w4a16gen.wording import counted

NOT_RUN = "not run"
CHAIN_K = 512
"""K of the chains of dependent launches."""
SAMPLED_CHAIN_K = 128
"""K of the chains in a sample, for slow tools."""


@dataclass(frozen=True)
class Report:
    """The proofs of a build that ran, those that did not, and every failure."""

    value: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every proof that ran held."""
        return bool(self.value["static"]["ok"]) and self.value["numerics"]["status"] != "failed"

    @property
    def numerics_ran(self) -> bool:
        """Whether the kernels ran on a Hopper GPU."""
        return bool(self.value["numerics"]["status"] != NOT_RUN)

    def violations(self) -> list[str]:
        """Return every failure as a sentence."""
        numerics = [
            f"{kernel['name']}: {failure}"
            for kernel in self.value["numerics"]["kernels"]
            for failure in kernel["failures"]
        ]
        return [*self.value["static"]["violations"], *numerics]

    def summary(self) -> str:
        """Summarise the proofs in two sentences."""
        count = len(self.value["static"]["kernels"])
        held = "hold" if self.value["static"]["ok"] else "FAIL"
        numerics = self.value["numerics"]
        if not self.numerics_ran:
            proven = f"Numerics were NOT run: {numerics['reason']}."
        else:
            checks = sum(sum(kernel["passed"].values()) for kernel in numerics["kernels"])
            failures = sum(len(kernel["failures"]) for kernel in numerics["kernels"])
            ran = sum(bool(kernel["passed"] or kernel["failures"]) for kernel in numerics["kernels"])
            proven = (
                f"Numerics of {ran} of them on {numerics['gpu']}: {counted(checks, 'check')} passed, {failures} failed."
            )
        return f"Static proofs {held} for {counted(count, 'kernel')}. {proven}"

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Return one row per kernel, under `HEADINGS`."""
        numerics = {kernel["name"]: kernel for kernel in self.value["numerics"]["kernels"]}
        for kernel in self.value["static"]["kernels"]:
            proof = numerics.get(kernel["name"])
            if proof is None:
                checks, worst = "not run", ""
            else:
                total = sum(proof["passed"].values()) + len(proof["failures"])
                checks, worst = f"{sum(proof['passed'].values())}/{total}", f"{proof['worst_error_over_bound']:.3f}"
            yield (
                kernel["mode"],
                "x".join(map(str, kernel["cta"])),
                "x".join(map(str, kernel["cluster"])),
                f"{kernel['schedule']}, {kernel['scheduler']}",
                str(kernel["registers"]),
                str(kernel["stages"]),
                f"{kernel['shared_memory_bytes'] / 1024:.0f}",
                f"{kernel['code_bytes'] / 1024:.0f}",
                f"{kernel['compile_cpu_seconds']:.1f}",
                f"{kernel['compile_peak_bytes'] / 1e9:.1f}",
                checks,
                worst,
            )

    def markdown(self) -> str:
        """Return the report as a page."""
        lines = ["# Verification report", "", self.summary(), ""]
        lines += [f"Date {self.value['date']}; compiler {self.value['compiler']}; CUTLASS {self.value['cutlass']}.", ""]
        lines += [f"- FAILED: {violation}" for violation in self.violations()]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        lines += ["", "`checks` counts numerical checks passed; `error/bound` is the largest error over its bound."]
        lines += ["Compile CPU-seconds are a kernel's share of its compile unit; the peak is that of the unit."]
        return "\n".join(lines) + "\n"


HEADINGS = (
    "mode",
    "CTA (channels x tokens x k)",
    "cluster",
    "schedule",
    "registers",
    "stages",
    "shared KiB",
    "code KiB",
    "compile CPU s",
    "compile peak GB",
    "checks",
    "error/bound",
)


def verify(
    library: Library,
    generated: Path | None = None,
    *,
    sampled: bool = False,
    drawn_problems: int = 0,
    progress: Progress = no_progress,
) -> Report:
    """Prove a build: statically everywhere, numerically where there is a Hopper GPU.

    Args:
        library: the loaded build.
        generated: the folder that its sources were emitted to; None takes the one that the build's manifest names.
        sampled: those of `numeric.sample` on small problems only, and short chains.
        drawn_problems: random problems to run beside the fixed cases, and as many random routings of grouped kernels.
        progress: called as the numerical proofs advance.
    """
    proof = static.prove(library, generated)
    manifest = library.build.manifest
    return Report(
        {
            "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
            "compiler": manifest.compiler,
            "cutlass": manifest.cutlass,
            "static": {"ok": proof.ok, "violations": proof.violations, "kernels": proof.kernels},
            "numerics": _numerics(library, sampled=sampled, drawn_problems=drawn_problems, progress=progress),
        }
    )


def _numerics(library: Library, *, sampled: bool, drawn_problems: int, progress: Progress) -> dict[str, Any]:
    """Run the numerical proofs, or say why they cannot run."""
    hopper = library.hopper_devices()
    if not hopper:
        found = ", ".join(map(str, library.devices()))
        reason = f"this machine has {found or 'no CUDA GPU'}; they need an NVIDIA Hopper GPU (compute capability 9.0)"
        if not found and (fault := library.why_no_device()):
            reason = f"no GPU can be used: {fault}"
        return {"status": NOT_RUN, "reason": reason, "kernels": []}
    gpu = hopper[0]
    kernels = numeric.prove(library, device=gpu.index, sampled=sampled, progress=progress)
    proofs = {KernelConfig.parse(kernel.name): kernel for kernel in kernels}
    shapes = epilogues.SHAPES[:1] if sampled else epilogues.SHAPES
    epilogues.prove_epilogues(library, proofs, device=gpu.index, shapes=shapes, progress=progress)
    k = SAMPLED_CHAIN_K if sampled else CHAIN_K
    launch_chains.prove_chains(library, proofs, sm_count=gpu.sm_count, device=gpu.index, k=k, progress=progress)
    grouped = {config: numeric.NumericProof(config.name) for config in library.grouped_configs()}
    counts = experts.EXPERTS[:2] if sampled else experts.EXPERTS
    experts.prove_experts(library, grouped, device=gpu.index, experts=counts, progress=progress)
    kernels += grouped.values()
    if drawn_problems:
        random_problems.prove_random(library, proofs, drawn_problems, device=gpu.index, progress=progress)
        experts.prove_random_routings(library, grouped, drawn_problems, device=gpu.index, progress=progress)
    return {
        "status": "failed" if any(kernel.failures for kernel in kernels) else "passed",
        "gpu": gpu.name,
        "sm_count": gpu.sm_count,
        "sampled": sampled,
        "drawn_problems": drawn_problems,
        "kernels": [kernel.as_json() for kernel in kernels],
    }
