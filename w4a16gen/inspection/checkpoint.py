"""What is found in a checkpoint: layers by kind, dense tensors by kind, and what engines need to know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from w4a16gen.choose.chooser import Chooser
from w4a16gen.errors import InvalidValueError, UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.progress import Progress
from w4a16gen.weights.division import Axis, Share, axis_of, share
from w4a16gen.weights.expert_names import find_experts
from w4a16gen.weights.importers.checkpoint import Checkpoint, open_checkpoint
from w4a16gen.weights.importers.folder import read_json
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.rounding import Exactness
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS, check_layout_group_size
from w4a16gen.wording import counted

TOKENS = (1, 16, 256)
"""Numbers of tokens that kernels are named for."""
_MOST_USABLE = 64
_VECTOR = "a vector"
_NUMBER = re.compile(r"\b\d+\b")
_LAYOUT = TARGET_LAYOUTS[Target.NATIVE]
_GROUPED = "`w4a16gen build --space default --space experts --epilogue none --epilogue gated`"


@dataclass(frozen=True)
class LayerKind:
    """Layers that differ in nothing but the numbers in their names."""

    pattern: str
    format: str
    whole: Share
    mode: QuantMode
    act_order: bool
    axis: Axis
    share: Share | str
    kernels: Mapping[int, KernelConfig | str]
    count: int = 0
    inexact: int = 0
    max_scale_error: float = 0.0
    max_zero_error_steps: float = 0.0

    def with_layer(self, exact: Exactness) -> LayerKind:
        """Return the kind with one more layer."""
        return replace(
            self,
            count=self.count + 1,
            inexact=self.inexact + (not exact.is_exact),
            max_scale_error=max(self.max_scale_error, exact.max_scale_error),
            max_zero_error_steps=max(self.max_zero_error_steps, exact.max_zero_error_steps),
        )

    @property
    def values(self) -> str:
        """What the layers lose, in a few words."""
        if not self.inexact:
            return "exact"
        some = "" if self.inexact == self.count else f" in {self.inexact}"
        if self.max_scale_error:
            return f"scales to {self.max_scale_error:.0e}{some}"
        return f"zeros to {self.max_zero_error_steps:.2g} step{some}"

    @property
    def verdict(self) -> str:
        """What dividing the layer changes."""
        if isinstance(self.share, str):
            return self.share
        if self.axis is Axis.NONE:
            return "whole on each GPU"
        changed = self.whole.group_size not in (self.share.group_size, self.whole.k)
        return "groups divided, exact" if changed else "exact"


@dataclass(frozen=True)
class DenseKind:
    """Dense tensors that differ in nothing but the numbers in their names."""

    pattern: str
    dtype: str
    reason: str
    bytes: int
    count: int = 1


@dataclass
class Inspection:
    """All that is found."""

    path: Path
    method: str
    gpus: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[LayerKind] = field(default_factory=list)
    dense: list[DenseKind] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def usable_gpus(self) -> list[int]:
        """Numbers of GPUs, up to 64, among which every layer can be divided."""
        return [
            count
            for count in range(1, _MOST_USABLE + 1)
            if not any(
                isinstance(share(kind.whole, kind.axis, count, act_order=kind.act_order), str) for kind in self.kinds
            )
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the members of the command's JSON object."""
        return {
            "path": str(self.path),
            "method": self.method,
            "layers": self.layers,
            "dense": [vars(kind) for kind in self.dense],
            "unsupported": self.unsupported,
            "notes": self.notes,
            "settings": self.settings,
            "totals": self.totals,
            "gpus": self.gpus,
            "usable_gpus": self.usable_gpus,
        }


def inspect_checkpoint(
    path: Path, chooser: Chooser, device: Device | None, gpus: int, progress: Progress
) -> Inspection:
    """Read all scales and zero points of a checkpoint, and choose kernels for its layers.

    Raises:
        InvalidValueError: if the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(path)
    found = Inspection(path, checkpoint.method, gpus)
    chosen: dict[tuple[Share, QuantMode], dict[int, KernelConfig | str]] = {}
    kinds: dict[tuple[str, str, Share, QuantMode, bool], LayerKind] = {}
    notes: dict[str, int] = {}
    sharers = Counter(name for layer in checkpoint.values() for name in layer.tensor_names)
    for number, (name, layer) in enumerate(checkpoint.items(), 1):
        whole, axis = Share(layer.n, layer.k, layer.group_size), axis_of(name)
        part = share(whole, axis, gpus, act_order=layer.permutation is not None)
        run = whole if isinstance(part, str) else part
        if (run, layer.mode) not in chosen:
            chosen[run, layer.mode] = _kernels(chooser, device, run, layer.mode)
        kernels = chosen[run, layer.mode]
        act_order = layer.permutation is not None
        key = (_NUMBER.sub("*", name), layer.format, whole, layer.mode, act_order)
        kind = kinds.get(key) or LayerKind(*key, axis, part, kernels)
        kinds[key] = kind = kind.with_layer(layer.exactness)
        found.layers.append(_layer_json(checkpoint, layer, kind, sharers))
        for text in layer.notes:
            notes[text] = notes.get(text, 0) + 1
        progress(number, len(checkpoint), name)
    found.kinds = list(kinds.values())
    found.dense = _dense(checkpoint)
    found.unsupported = _by_pattern(checkpoint.unsupported)
    found.notes = [f"{text} ({counted(count, 'layer')})" for text, count in notes.items()]
    if experts := find_experts(checkpoint):
        found.notes.append(
            f"Grouped kernels compute the experts of {counted(len(experts), 'layer')} instead: {_GROUPED} builds them"
        )
    found.totals = {
        "layers": len(found.layers),
        "layer_bytes": sum(layer["bytes"] for layer in found.layers),
        "packed_bytes": sum(layer["packed_bytes"] or 0 for layer in found.layers),
        "dense_tensors": sum(kind.count for kind in found.dense),
        "dense_bytes": sum(kind.bytes for kind in found.dense),
    }
    found.settings = _settings(checkpoint, found)
    return found


def _kernels(chooser: Chooser, device: Device | None, part: Share, mode: QuantMode) -> dict[int, KernelConfig | str]:
    """Return the kernel for each number of tokens, or why there is none."""
    found: dict[int, KernelConfig | str] = {}
    for tokens in TOKENS:
        problem = Problem(tokens, part.n, part.k, part.group_size)
        try:
            found[tokens] = chooser.choose(problem, mode, device=device, target=Target.NATIVE).kernel
        except UnsupportedProblemError as error:
            found[tokens] = f"none: {error}"
    return found


def _layer_json(
    checkpoint: Checkpoint, layer: CheckpointLayer, kind: LayerKind, sharers: Mapping[str, int]
) -> dict[str, Any]:
    """Return the JSON of a layer. Experts that share a tensor share its bytes."""
    exact = layer.exactness
    return {
        "name": layer.name,
        "format": layer.format,
        "n": layer.n,
        "k": layer.k,
        "group_size": layer.group_size,
        "mode": layer.mode.value,
        "bytes": sum(checkpoint.tensors[name].size // sharers[name] for name in layer.tensor_names),
        "packed_bytes": _packed_bytes(layer),
        "scales_exact": exact.scales_exact,
        "zeros_exact": exact.zeros_exact,
        "max_zero_error_steps": exact.max_zero_error_steps,
        "alpha": exact.alpha,
        "act_order": kind.act_order,
        "kernels": {
            str(tokens): kernel.name if isinstance(kernel, KernelConfig) else None
            for tokens, kernel in kind.kernels.items()
        },
        "divided": None if isinstance(kind.share, str) else vars(kind.share),
        "axis": kind.axis.value,
        "verdict": kind.verdict,
        "notes": list(layer.notes),
    }


def _packed_bytes(layer: CheckpointLayer) -> int | None:
    """Return the bytes of the packed layer; None if the native layout does not hold it."""
    try:
        check_layout_group_size(_LAYOUT, layer.k, layer.group_size, layer.mode)
    except InvalidValueError:
        return None
    return LAYOUTS[_LAYOUT].packed_bytes(WeightGeometry(layer.n, layer.k, layer.group_size, layer.mode))


def _dense(checkpoint: Checkpoint) -> list[DenseKind]:
    """Return the dense tensors by kind, the largest first; vectors are one kind if their last two words agree."""
    members: dict[tuple[str, str, str], list[str]] = {}
    for name in checkpoint.dense:
        info = checkpoint.tensors[name]
        reason = _why_dense(name, info.shape, checkpoint.unsupported)
        last = ".".join(name.split(".")[-2:])
        pattern = f"*.{last}" if reason == _VECTOR and last != name else _NUMBER.sub("*", name)
        members.setdefault((pattern, info.dtype, reason), []).append(name)
    kinds = [
        DenseKind(
            pattern if len(names) > 1 else _NUMBER.sub("*", names[0]),
            dtype,
            reason,
            sum(checkpoint.tensors[name].size for name in names),
            len(names),
        )
        for (pattern, dtype, reason), names in members.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.bytes)


def _why_dense(name: str, shape: Sequence[int], unsupported: Iterable[str]) -> str:
    if any(name.startswith(f"{module}.") for module in unsupported):
        return "not readable as 4 bits"
    if len(shape) < 2:  # noqa: PLR2004
        return _VECTOR
    if "embed" in name or "embd" in name:
        return "an embedding"
    return "not quantized in the checkpoint"


def _by_pattern(reasons: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(_NUMBER.sub("*", name), []).append(reason)
    return {name if len(texts) == 1 else f"{name} ({len(texts)})": texts[0] for name, texts in found.items()}


def _settings(checkpoint: Checkpoint, found: Inspection) -> list[str]:
    """Return what engines must be told, one sentence each."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = read_json(folder, "config.json")
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    dtype = config.get("dtype", config.get("torch_dtype"))
    texts = []
    if dtype in ("bfloat16", "float32"):
        texts.append(
            f"Engines: the model runs in {dtype}, the kernels in FP16. Pass --dtype float16 to avoid a cast around "
            "each layer, if its activations stay below 65504"
        )
    if any(kind.act_order for kind in found.kinds):
        texts.append("Engines: act-order needs a gather of the activations before each layer")
    without = [kind for kind in found.kinds if any(isinstance(kernel, str) for kernel in kind.kernels.values())]
    if never := [kind.pattern for kind in without if not _default_kernels_run(kind)]:
        texts.append(f"No kernel runs these layers; keep them dense: {', '.join(never)}")
    if here := [kind.pattern for kind in without if _default_kernels_run(kind)]:
        texts.append(f"No kernel here runs these layers, but those of `w4a16gen build` do: {', '.join(here)}")
    return texts


def _default_kernels_run(kind: LayerKind) -> bool:
    """Return whether kernels of the default set run a layer, whatever is built."""
    run = kind.whole if isinstance(kind.share, str) else kind.share
    config = next(config for config in enumerate_space("default") if config.mode is kind.mode)
    return why_cannot_run(config, Problem(1, run.n, run.k, run.group_size)) is None
