"""The shape of every JSON object that commands print: members and their types."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
OPTIONAL_TEXT = (str, type(None))
PROBLEM = {"m": int, "n": int, "k": int, "group_size": int}
GPU = {"index": int, "name": str, "compute_capability": [int], "sm_count": int}
KERNEL = {
    "name": str,
    "target": str,
    "mode": str,
    "cta": [int],
    "cluster": [int],
    "schedule": str,
    "scheduler": str,
    "epilogue": str,
}
NODE = {"node": str, "tasks": int, "seconds": NUMBER, "lost": int}
BUILD = {
    "folder": str,
    "library": str,
    "compiled": int,
    "up_to_date": int,
    "failures": [{"kernel": str, "summary": str, "log": str}],
    "kernels": [str],
    "nodes": [NODE],
}
PROOFS = {
    "date": str,
    "compiler": str,
    "cutlass": str,
    "static": {"ok": bool, "violations": [str], "kernels": [dict]},
    "numerics": {"status": str, "reason": str, "kernels": [dict]},
}
STANDING = {"cells": int, "mean": NUMBER, "worst": NUMBER, "worst_cell": str, "lost": int, "lost_clearly": int}
RANDOM = {
    "seed": int,
    "cells": int,
    "timed": int,
    "left_out": int,
    "seconds": NUMBER,
    "bands": [
        {
            "tokens": [int],
            "cells": int,
            "call_beside_fastest_fp16_rival": STANDING,
            "best_built_beside_fastest_fp16_rival": STANDING,
            "call_beside_best_built": STANDING,
            "call_beside_rivals": {str: STANDING},
        }
    ],
    "rivals_left_out": [{"rival": str, "reason": str, "cells": int}],
}
"""The member `random` of a bench object, if problems were drawn and rivals timed."""
SPACE = {
    "space": str,
    "estimated": int,
    "promising": int,
    "not_built": int,
    "not_measured": int,
    "kernels": [str],
    "mean_loss": OPTIONAL_NUMBER,
    "worst_loss": OPTIONAL_NUMBER,
}
"""The member `space` of a tune object, if a space was tuned."""
WRITTEN = {
    "folder": str,
    "layers": int,
    "dense": int,
    "bytes": int,
    "shards": int,
    "skipped": {str: str},
    "was_complete": bool,
}
SHARES = {"products": NUMBER, "attention": NUMBER, "elementwise": NUMBER, "gaps": NUMBER}
STEP = {
    "step": {
        "name": str,
        "model": {str: int},
        "gpus": int,
        "sequences": int,
        "new_tokens": int,
        "context": int,
        "group_size": int,
        "layers": int,
    },
    "gpu": GPU,
    "mode": str,
    "floor_us": OPTIONAL_NUMBER,
    "timings": [
        {
            "name": str,
            "microseconds": [NUMBER],
            "median_us": NUMBER,
            "tokens_per_second": NUMBER,
            "speedup_over_fp16": OPTIONAL_NUMBER,
            "share_of_floor": OPTIONAL_NUMBER,
            "difference": NUMBER,
            "shares_us": (dict, type(None)),
        }
    ],
    "left_out": {str: str},
}
MOE = {
    "model": {
        "name": str,
        "hidden_size": int,
        "intermediate_size": int,
        "num_experts": int,
        "num_experts_per_tok": int,
        "group_size": int,
        "gpus": int,
    },
    "gpu": GPU,
    "mode": str,
    "points": [
        {
            "tokens": int,
            "rows": NUMBER,
            "experts_hit": NUMBER,
            "weight_bytes": int,
            "floor_us": OPTIONAL_NUMBER,
            "kernels": {"gate_up": str, "down": str},
            "timings": [
                {
                    "name": str,
                    "microseconds": [NUMBER],
                    "median_us": NUMBER,
                    "least_us": NUMBER,
                    "most_us": NUMBER,
                    "share_of_floor": OPTIONAL_NUMBER,
                    "tflops": NUMBER,
                    "error": NUMBER,
                }
            ],
            "parts_us": {str: NUMBER},
            "left_out": {str: str},
        }
    ],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "list": {"built": bool, "spaces": [str], "kernels": [KERNEL]},
    "emit": {
        "spaces": [str],
        "folder": str,
        "files": [{"path": str, "written": bool, "kernels": [str]}],
        "removed": [str],
    },
    "build": BUILD,
    "verify": PROOFS,
    "build-and-verify": {"build": BUILD, "verify": PROOFS},
    "export": {"kernels": int, "written": [str]},
    "clean": {"folder": str, "removed": [str]},
    "inspect": {
        "path": str,
        "method": str,
        "layers": [
            {
                "name": str,
                "format": str,
                "n": int,
                "k": int,
                "group_size": int,
                "mode": str,
                "bytes": int,
                "packed_bytes": (int, type(None)),
                "scales_exact": bool,
                "zeros_exact": bool,
                "max_zero_error_steps": OPTIONAL_NUMBER,
                "alpha": NUMBER,
                "act_order": bool,
                "kernels": {"1": OPTIONAL_TEXT, "16": OPTIONAL_TEXT, "256": OPTIONAL_TEXT},
                "axis": str,
                "divided": (dict, type(None)),
                "verdict": str,
                "notes": [str],
            }
        ],
        "dense": [{"pattern": str, "dtype": str, "reason": str, "bytes": int, "count": int}],
        "unsupported": {str: str},
        "notes": [str],
        "settings": [str],
        "totals": {
            "layers": int,
            "layer_bytes": int,
            "packed_bytes": int,
            "dense_tensors": int,
            "dense_bytes": int,
        },
        "gpus": int,
        "usable_gpus": [int],
        "built": bool,
        "among": str,
    },
    "convert": WRITTEN,
    "quantize": WRITTEN,
    "run": {
        "gpu": GPU,
        "problem": PROBLEM,
        "mode": str,
        "built": int,
        "candidates": [str],
        "kernel": str,
        "workspace_bytes": int,
        "ok": bool,
        "error_over_bound": OPTIONAL_NUMBER,
        "checked_rows": int,
        "microseconds": NUMBER,
        "replays_microseconds": [NUMBER],
        "launches_per_replay": int,
        "tflops": NUMBER,
    },
    "bench": {
        "gpu": GPU,
        "peak_tflops": {"burst": NUMBER, "sustained": NUMBER},
        "random": (dict, type(None)),
        "steps": list,
        "moe": list,
        "comparisons": [
            {
                "problem": PROBLEM,
                "mode": str,
                "screened": {str: NUMBER},
                "left_out": int,
                "chosen": OPTIONAL_TEXT,
                "rivals_left_out": {str: str},
                "error_over_bound": {str: OPTIONAL_NUMBER},
                "timings": [{"contender": str, "isolated": [NUMBER], "dependent": [NUMBER]}],
            }
        ],
        "smallest_set": [str],
        "wrong": {str: OPTIONAL_NUMBER},
        "written": [str],
        "nodes": [NODE],
    },
    "report": {"folder": str, "problems": int, "written": [str]},
    "tune": {
        "gpu": GPU,
        "table": str,
        "tables": {str: str},
        "nodes": [NODE],
        "problems": [
            {
                "problem": PROBLEM,
                "name": str,
                "card": str,
                "measured": int,
                "known": int,
                "left_out": int,
                "fastest": OPTIONAL_TEXT,
                "microseconds": OPTIONAL_NUMBER,
            }
        ],
        "space": (dict, type(None)),
    },
    "explain": {
        "problem": PROBLEM,
        "mode": str,
        "built": bool,
        "among": str,
        "gpu": (dict, type(None)),
        "kernel": str,
        "source": str,
        "dependent": bool,
        "microseconds": OPTIONAL_NUMBER,
        "fp16_microseconds": NUMBER,
        "kernels": [{"kernel": str, "microseconds": OPTIONAL_NUMBER, "basis": str}],
    },
    "audit": {
        "folder": str,
        "ok": bool,
        "instantiations": int,
        "present": [str],
        "missing": [str],
        "duplicates": [str],
        "foreign": {str: int},
        "foreign_places": {str: [str]},
        "unknown": [str],
        "unknown_places": [str],
        "conditional": [{"what": str, "condition": str}],
        "problems": [str],
        "files": [{"file": str, "types": {str: int}, "mixed": bool, "kernels": [str]}],
        "extracted": [str],
    },
    "doctor": {"ok": bool, "findings": [{"subject": str, "level": str, "detail": str, "fix": str}]},
    "completion": {"shell": str, "script": str},
    "error": {"error": {"type": str, "message": str, "exit_code": int}},
}


def check(value: Any, shape: Any, where: str) -> None:
    """Raise unless a value has a shape: a type, several, [of a list], {of each member} or {str: of all members}."""
    if isinstance(shape, dict) and str in shape:
        assert isinstance(value, dict), where
        for key, member in value.items():
            check(member, shape[str], f"{where}.{key}")
    elif isinstance(shape, dict):
        assert isinstance(value, dict), where
        assert value.keys() == shape.keys(), where
        for key, member in value.items():
            check(member, shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for index, member in enumerate(value):
            check(member, shape[0], f"{where}[{index}]")
    else:
        assert isinstance(value, shape), f"{where} is {value!r}"
        assert not isinstance(value, bool) or shape is bool, where
