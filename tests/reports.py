"""Reports that tests show, write and check."""

from __future__ import annotations

from typing import Any

from onnxcomp.ledger import Attempt, Figures, PassEntry, Report, StageEntry


def quantized_stage() -> StageEntry:
    """A stage whose second form was kept."""

    def entry(exclude: str) -> PassEntry:
        return PassEntry(
            "quantize",
            {"per_channel": True, "calibration": "minmax", "float_nodes": exclude},
            changed=[{"where": f"/features/{index}/Conv", "what": "runs in int8"} for index in range(17)],
            left=[{"where": "/head/Gemm", "why": "costs more accuracy than it gains"}],
            seconds=3.2,
        )

    first = Attempt([entry("")], "dropped", "over the budget: drop 0.0210", 4.1, 1.9, 3.7, 0.021, (0.01, 0.03))
    second = Attempt([entry("/head/Gemm")], "kept", "3.6 times smaller, 1.8 times as fast", 3.4, 1.8, 3.6, 0.002)
    return StageEntry("quantize", "kept", "3.6 times smaller, 1.8 times as fast", 7.6, [first, second])


def sample_report(**changes: Any) -> Report:
    """A report with something of everything."""
    simplify = PassEntry(
        "simplify",
        {},
        changed=[{"where": "bn1", "what": "folded into conv1"}],
        left=[{"where": f"node{index}", "why": "excluded"} for index in range(5)],
        seconds=0.1,
    )
    stages = [
        StageEntry("simplify", "kept", "1.02 times smaller", 0.2, [Attempt([simplify], "kept", "same", 0.2)]),
        StageEntry("quantize-weights", "unchanged", "nothing to do", 0.0, []),
        quantized_stage(),
    ]
    facts: dict[str, Any] = {
        "verdict": "3.60 times smaller, 1.80 times as fast, drop 0.0020",
        "speed": 1.8,
        "size": 3.6,
        "quality": "metric",
        "budget_met": True,
        "before": Figures(
            size_bytes=754883,
            deflated_bytes=688517,
            resident_bytes=735720,
            parameters=183930,
            nonzeros=183930,
            macs=4369512,
            int8_macs=0,
            latency_ms=1.234,
            latency_p10_ms=1.2,
            latency_p90_ms=1.31,
            load_ms=3.1,
            latency_evidence="measured",
            metric=0.912,
            drop=0.0,
            drop_interval=(0.0, 0.0),
            error=0.0,
            sqnr_db=float("inf"),
            agreement=1.0,
            kernels={"Conv": 21},
        ),
        "after": Figures(
            size_bytes=209690,
            deflated_bytes=180000,
            resident_bytes=190000,
            parameters=183930,
            nonzeros=180000,
            macs=4369512,
            int8_macs=4100000,
            latency_ms=0.685,
            latency_p10_ms=0.67,
            latency_p90_ms=0.72,
            load_ms=4.0,
            latency_evidence="measured",
            metric=0.910,
            drop=0.002,
            drop_interval=(-0.001, 0.0052),
            error=0.043,
            sqnr_db=31.2,
            agreement=0.985,
            kernels={"QLinearConv": 20, "Conv": 1},
        ),
        "stages": stages,
        "model": {"path": "in/model.onnx", "sha256": "0" * 64, "size_bytes": 754883, "opset": 17, "ir_version": 8},
        "output": {"path": "out/small.onnx", "sha256": "1" * 64, "size_bytes": 209690},
        "data": {
            "description": "test.npz: 1,000 samples",
            "sha256": "2" * 64,
            "samples": 1000,
            "generated": False,
            "labels": True,
            "calibrate": 500,
            "select": 250,
            "confirm": 250,
        },
        "metric": {"name": "top1", "higher_is_better": True},
        "budget": {"max_drop": 0.005, "max_error": 0.1},
        "target": "x86-vnni",
        "options": {
            "exclude": [],
            "force": False,
            "time_limit": None,
            "seed": 0,
            "shapes": {},
            "keep_debug": False,
            "timing": True,
        },
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "machine": "x86_64",
            "cpu_features": ["avx2"],
            "threads": 1,
            "versions": {"onnxcomp": "0.1.0"},
        },
        "seconds": 9.4,
        "created": "2025-01-01T00:00:00+00:00",
        "warnings": ["250 samples are too few to be sure of the budget: the drop may be 0.0052"],
        "notes": ["the labels look like classes: judged by top1"],
    }
    return Report(**{**facts, **changes})


def layer(name: str, **changes: Any) -> dict[str, Any]:
    """A row of the report's layers: a convolution that was made int8."""
    facts: dict[str, Any] = {
        "name": name,
        "op": "Conv",
        "where": "both",
        "tensor": f"{name}_output_0",
        "output_shape": [1, 24, 14, 14],
        "weight_shape": [24, 1, 3, 3],
        "weight_bytes_before": 864,
        "weight_bytes_after": 216,
        "kernel_before": "Conv",
        "kernel_after": "QLinearConv",
        "reason": None,
        "sqnr_db": 31.2,
        "error": 0.0275,
        "weight_before": f"{name}.weight",
        "weight_after": f"{name}.weight_quantized",
        "weight_type_before": "float32",
        "weight_type_after": "int8",
        "weight_zeros_before": 0.0,
        "weight_zeros_after": 0.25,
        "macs": 42_336,
    }
    assert changes.keys() <= facts.keys()
    return {**facts, **changes}


def large_report(rows: int) -> Report:
    """A report of a model with this many layers, each changed by two passes and left alone by one."""
    names = [f"/encoder/layers.{index // 8}/block.{index % 8}/attention/query/MatMul" for index in range(rows)]
    changed = [{"where": name, "what": f"{index % 97} of 4,096 weights are zero"} for index, name in enumerate(names)]
    left = [{"where": name, "why": f"costs {index % 89 / 1000:.3f} of the metric"} for index, name in enumerate(names)]
    entries = [PassEntry(name, {}, changed=changed, left=left) for name in ("prune", "quantize")]
    attempts = [
        Attempt(entries, "kept", "2.00 times smaller", 1.0, 1.5, 2.0, 0.001, (0.0, 0.002), 0.01, None, "measured")
    ]
    layers = [
        layer(name, error=index / rows, weight_bytes_before=4 * index, weight_bytes_after=index, macs=index * 1009)
        for index, name in enumerate(names)
    ]
    return sample_report(stages=[StageEntry("prune", "kept", "2.00 times smaller", 1.0, attempts)], layers=layers)
