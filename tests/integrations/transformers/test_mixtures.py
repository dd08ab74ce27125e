"""Mixtures of experts: every format, every name, every loader; and that no expert is lost, doubled or exchanged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.quantize import quantize
from w4a16gen.weights.writers.convert import convert
from w4a16gen.weights.writers.quantize import Settings, quantize_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
safetensors = pytest.importorskip("safetensors.torch")
from fakes import tiny_models as tiny  # noqa: E402
from fakes.checkpoints import packers  # noqa: E402
from fakes.tiny_folders import PLAIN_GPTQ, awq_tensors, folder_with, gptq_tensors, plain_gptq_tensors  # noqa: E402

from w4a16gen.integrations.torch import W4A16Experts, W4A16Linear  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained  # noqa: E402
from w4a16gen.integrations.transformers.experts import modules_of_experts, why_not_served  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        not modules_of_experts(tiny.tiny_model("mixtral")), reason="this transformers has a module for each expert"
    ),
]
ACT_ORDER = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
KINDS = pytest.mark.parametrize("kind", tiny.MIXTURES)
LINEARS = {"qwen3_moe": (15, 16), "mixtral": (8, 9), "qwen2_moe": (14, 17)}
"""Linear layers that are served, and all: a head stays dense, and so does the gate of a shared expert."""


def gptq_folder(model: Any, tmp_path: Path, **options: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    return folder_with(tmp_path / "int4", model, plain_gptq_tensors, PLAIN_GPTQ, **options)


def rounded(values: Any) -> Any:
    """Return the exact values of a rounded matrix in its dtype."""
    return torch.from_numpy(quantize(values.float().numpy(), group_size=32).dequantize()).to(values.dtype)


def rounded_model(model: Any) -> Any:
    """Return a copy of a model whose experts and linear layers have the values that their files say, in fp32."""
    result = copy.deepcopy(model).float()
    for name, module in result.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and module.out_features % 8 == 0:
            module.weight.data = rounded(module.weight.data)
    for module in modules_of_experts(result).values():
        for part in (module.gate_up_proj, module.down_proj):
            part.data = torch.stack([rounded(matrix) for matrix in part.data])
    return result


@KINDS
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_computes_what_its_dequantized_form_does(kind: str, shards: int, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind)
    model = from_pretrained(gptq_folder(original, tmp_path, shards=shards), device="cpu")
    assert type(model) is type(original)
    got, wanted = model(tiny.tokens()).logits.float(), rounded_model(original)(tiny.tokens()).logits
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    report = model.w4a16gen_report
    served, linears = LINEARS[kind]
    assert str(report) == f"w4a16gen serves {served} of {linears} linear layers and the experts of 2 of 2 layers"
    assert report.unused == ()
    assert report.dense_experts == {}
    assert report.experts == tuple(f"model.layers.{i + (kind == 'qwen3_moe')}.mlp.experts" for i in range(2))
    assert not any("experts." in name for name, _ in model.named_parameters())
    assert report.packed_bytes + report.dense_bytes < 0.5 * sum(part.nbytes for part in original.parameters())


@KINDS
def test_each_layer_of_experts_lies_within_the_bound(kind: str, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind)
    model = from_pretrained(gptq_folder(original, tmp_path), device="cpu")
    calls: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, W4A16Experts):
            module.register_forward_hook(lambda _, given, out, name=name: calls.__setitem__(name, (*given, out)))
    model(tiny.tokens())
    assert list(calls) == list(model.w4a16gen_report.experts)
    for name, (hidden, ids, factors, out) in calls.items():
        own = original.get_submodule(name)
        halves = [matrix.chunk(2) for matrix in own.gate_up_proj]
        gate, up = ([quantize(pair[i].float().numpy(), group_size=32) for pair in halves] for i in range(2))
        down = [quantize(matrix.float().numpy(), group_size=32) for matrix in own.down_proj]
        expectation = MoeExpectation(hidden.numpy(), gate, up, down, ids.numpy(), factors.float().numpy())
        assert 0 < expectation.error_over_bound(out.numpy()) <= 1


ROUTES = {"act-order": (gptq_tensors, ACT_ORDER), "awq": (awq_tensors, AWQ)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", [*ROUTES, "compressed-tensors", "compressed-tensors with zeros"])
@KINDS
def test_formats_dtypes_and_loaders_agree(kind: str, route: str, dtype: Any, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind, dtype)
    folder = tmp_path / "int4"
    if route in ROUTES:
        folder_with(folder, original, *ROUTES[route])
    else:
        plain = folder_with(tmp_path / "dense", original, None, {}, dense=("",))
        (plain / "config.json").write_text(json.dumps(original.config.to_dict()))
        quantize_model(plain, folder, Settings(group_size=32, zero_points="zeros" in route))
    convert(folder, tmp_path / "packed")
    model = from_pretrained(folder, device="cpu")
    assert model.dtype == dtype
    assert model.w4a16gen_report.dense_experts == {}
    assert model.w4a16gen_report.unused == ()
    logits = model(tiny.tokens()).logits
    ours = from_pretrained(tmp_path / "packed", device="cpu")
    assert ours.w4a16gen_report.experts == model.w4a16gen_report.experts
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for other in (ours, theirs):
        assert torch.equal(other(tiny.tokens()).logits, logits)
        layers = [module for module in other.modules() if isinstance(module, W4A16Experts)]
        assert len(layers) == len(model.w4a16gen_report.experts)
        assert all(layer.gate_up.weights_of().gated for layer in layers)
    dense = model.dequantize(torch.float32).float()
    assert not any(isinstance(module, (W4A16Experts, W4A16Linear)) for module in dense.modules())
    wanted = dense(tiny.tokens()).logits
    close = (logits - wanted).abs().amax(-1) < (0.005 if dtype == torch.float16 else 0.05) * wanted.abs().max()
    moved = (
        1 if dtype == torch.float16 else close.numel() // 2 - 1
    )  # rounding decides between experts that are equally good
    assert close.sum() >= close.numel() - moved


def mlx_tensors(_module: str, values: Any) -> dict[str, Any]:
    """Return MLX's tensors of a weight, with zero points of 8."""
    weight = quantize(values, group_size=32)
    scales = np.ascontiguousarray(weight.scales.T)
    words = packers.along_columns(weight.q).view(np.uint32)
    return {"weight": words, "scales": scales, "biases": scales * np.float16(-8)}


@pytest.mark.parametrize("is_joined", [False, True])
def test_experts_that_a_file_stores_together_are_served(tmp_path: Path, *, is_joined: bool) -> None:
    original = tiny.tiny_model("qwen2_moe")
    folder = folder_with(tmp_path / "int4", original, mlx_tensors, {})
    tensors = safetensors.load_file(folder / "model.safetensors")
    stacked = {name for name in tensors if ".experts.0." in name}
    for name in stacked:
        of_all = [tensors.pop(name.replace("experts.0", f"experts.{expert}")) for expert in range(5)]
        tensors[name.replace("experts.0", "switch_mlp")] = torch.stack(of_all)
    assert len(stacked) == 2 * 3 * 3
    for name in [name for name in tensors if "switch_mlp.gate_proj" in name] if is_joined else []:
        parts = [tensors.pop(one) for one in (name, name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("switch_mlp.gate_proj", "experts.gate_up_proj")] = torch.cat(parts, dim=1)
        down = name.replace("gate_proj", "down_proj")
        tensors[down.replace("switch_mlp", "experts")] = tensors.pop(down)
    safetensors.save_file(tensors, folder / "model.safetensors")
    config = {**json.loads((folder / "config.json").read_text()), "quantization": {"bits": 4, "group_size": 32}}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    model = from_pretrained(folder, device="cpu")
    assert len(model.w4a16gen_report.experts) == 2
    assert model.w4a16gen_report.unused == ()
    gptq = from_pretrained(gptq_folder(original, tmp_path / "other"), device="cpu")
    assert torch.equal(model(tiny.tokens()).logits, gptq(tiny.tokens()).logits)


def generated(model: Any, **options: Any) -> Any:
    """Generate six tokens."""
    return model.generate(tiny.tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, **options)


def graphs_of_generate(model: Any) -> int:
    """Return how many graphs `generate` compiles, whose tokens must be those of the model itself."""
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    config = transformers.CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True  # noqa: SLF001  (transformers' own tests compile on the CPU so)
    got = generated(model, cache_implementation="static", compile_config=config)
    assert torch.equal(got, generated(model))
    return len(graphs)


@KINDS
def test_a_model_generates_and_is_compiled_as_a_whole(kind: str, tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model(kind), tmp_path)
    convert(folder, tmp_path / "packed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = from_pretrained(folder, device="cpu")
    for one in (model, theirs):
        assert torch.equal(generated(one)[:, 12], one(tiny.tokens()).logits[:, -1].argmax(-1))
        assert one.hf_quantizer.is_compileable
        assert len(one.hf_quantizer.experts) == 2
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(tiny.tokens(), use_cache=False).logits, model(tiny.tokens()).logits)
    assert graphs_of_generate(model) == 1


def test_experts_that_are_computed_one_by_one_keep_generate_from_compiling(tmp_path: Path) -> None:
    model = from_pretrained(
        folder_with(tmp_path / "int4", tiny.tiny_model("mixtral"), *ROUTES["act-order"]), device="cpu"
    )
    for own in (model, copy.deepcopy(model)):
        assert not own.hf_quantizer.is_compileable
        assert graphs_of_generate(own) == 0
    copied = copy.deepcopy(model)
    mine = {module for module in copied.modules() if isinstance(module, W4A16Experts)}
    assert set(copied.hf_quantizer.experts) == mine, "those of the copy, not of the model"
    quantizer = model.hf_quantizer
    model.dequantize(torch.float16)
    assert quantizer.experts == (), "which would keep their memory"


def changed(folder: Path, change: Any) -> Path:
    """Change the tensors of a folder."""
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)
    return folder


def without(part: str) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def test_a_missing_expert_and_other_sizes_are_named(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("qwen2_moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for members, message in (
        ({"num_experts": 6}, "has 5 experts in the checkpoint, but the model's .*mlp.experts has 6"),
        (
            {"moe_intermediate_size": 128},
            r"gate_proj' of the checkpoint is \[64, 128\], but the model's is \[128, 128\]",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **members}))
        with pytest.raises(InvalidValueError, match=message):
            from_pretrained(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(config))
    changed(folder, without("layers.1.mlp.experts.3.up_proj"))
    with pytest.raises(InvalidValueError, match=r"layers.1.mlp.experts': 1 of 5 lack a up projection: number 3"):
        from_pretrained(folder, device="cpu")
    changed(folder, without("layers.1.mlp.experts"))
    with pytest.raises(InvalidValueError, match=r"lacks 2 parameters .* such as model\.layers\.1\.mlp\.experts"):
        from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("dense", ["experts", "experts.2.down_proj", "layers.1.mlp.experts.2"])
def test_experts_that_are_not_of_4_bits_stay_dense(dense: str, tmp_path: Path) -> None:
    original = tiny.tiny_model("qwen2_moe")
    model = from_pretrained(gptq_folder(original, tmp_path, dense=dense), device="cpu")
    report = model.w4a16gen_report
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    served = [names[0]] if "layers.1" in dense else []
    assert list(report.experts) == served
    assert list(report.dense_experts) == [name for name in names if name not in served]
    assert all("4-bit" in reason for reason in report.dense_experts.values())
    assert report.unused == ()
    for name in report.dense_experts:
        own, got = original.get_submodule(name), model.get_submodule(name)
        for expert in range(5):
            pairs = [*zip(own.gate_up_proj[expert].chunk(2), got.gate_up_proj[expert].chunk(2), strict=True)]
            pairs.append((own.down_proj[expert], got.down_proj[expert]))
            for part, (wanted, found) in zip(("gate_proj", "up_proj", "down_proj"), pairs, strict=True):
                is_dense = dense in f"{name}.{expert}.{part}"
                assert torch.equal(found, wanted if is_dense else rounded(wanted))


def test_experts_of_other_kinds_stay_dense_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny.tiny_model("mixtral")
    folder = gptq_folder(original, tmp_path)
    convert(folder, tmp_path / "packed")
    wanted = from_pretrained(folder, device="cpu").dequantize(torch.float16)
    kind = type(original.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", lambda self, joint: self.act_fn(joint.chunk(2, -1)[0]))
    for path in (folder, tmp_path / "packed"):
        model = from_pretrained(path, device="cpu")
        assert set(model.w4a16gen_report.dense_experts.values()) == {
            "experts of MixtralExperts are not served: their result is not act(gate) * up"
        }
        for name in model.w4a16gen_report.dense_experts:
            for part in ("gate_up_proj", "down_proj"):
                assert torch.equal(getattr(model.get_submodule(name), part), getattr(wanted.get_submodule(name), part))
    with pytest.raises(InvalidValueError, match=r"not act\(gate\) \* up"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_model_of_which_nothing_is_served_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny.tiny_model("mixtral")
    folder = gptq_folder(original, tmp_path, dense=("attn", "lm_head"))
    assert len(from_pretrained(folder, device="cpu").w4a16gen_report.experts) == 2
    monkeypatch.setattr(type(original.model.layers[0].mlp.experts), "_apply_gate", None)
    with pytest.raises(InvalidValueError, match="none that MixtralForCausalLM can use: experts of MixtralExperts are"):
        from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("trait", "value", "reason"),
    [
        ("has_gate", False, "they have no gate"),
        ("has_bias", True, "they have biases"),
        ("is_concatenated", False, "their gate and up rows alternate"),
        ("has_post_expert_norm", True, "a norm follows each expert"),
        ("is_transposed", True, r"stored as \[k, n\]"),
        ("is_transposed", None, r"stored as \[k, n\]"),
    ],
)
def test_what_transformers_says_of_experts_is_heeded(trait: str, value: Any, reason: str) -> None:
    module = tiny.tiny_model("mixtral").model.layers[0].mlp.experts
    assert why_not_served(module) is None
    setattr(module, trait, value)
    assert reason.replace("\\", "") in str(why_not_served(module))
    delattr(module, trait)  # older versions of transformers have no such norms, and do not say so
    assert ("their kind is unknown" in str(why_not_served(module))) == (trait != "has_post_expert_norm")


def test_experts_that_are_called_in_another_way_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.tiny_model("mixtral").model.layers[0].mlp.experts

    def forward(_self: Any, hidden_states: Any, _router_logits: Any) -> Any:
        return hidden_states

    monkeypatch.setattr(type(module), "forward", forward)
    assert "they are called in another way" in str(why_not_served(module))


def test_a_bias_of_an_expert_is_dropped_only_if_it_is_zero(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    logits = from_pretrained(folder, device="cpu")(tiny.tokens()).logits
    name = "model.layers.0.block_sparse_moe.experts.1.w2.bias"
    changed(folder, lambda tensors: tensors.__setitem__(name, torch.zeros(128, dtype=torch.float16)))
    assert torch.equal(from_pretrained(folder, device="cpu")(tiny.tokens()).logits, logits)
    changed(folder, lambda tensors: tensors.__setitem__(name, torch.ones(128, dtype=torch.float16)))
    with pytest.raises(InvalidValueError, match=r"experts.1.w2' has a bias"):
        from_pretrained(folder, device="cpu")


def test_gate_and_up_of_different_modes_are_joined(tmp_path: Path) -> None:
    """One expert's up projection alone has zero points; the other experts are symmetric."""
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w3.qzeros"
    changed(folder, lambda tensors: tensors.__setitem__(name, torch.full_like(tensors[name], 0x55555555)))
    convert(folder, tmp_path / "packed")
    model, packed = (from_pretrained(path, device="cpu") for path in (folder, tmp_path / "packed"))
    experts = model.model.layers[0].mlp.experts
    assert (experts.gate_up.mode, experts.down.mode) == ("fgsz", "fgs")
    assert torch.equal(packed.model.layers[0].mlp.experts.gate_up.packed, experts.gate_up.packed)
    wanted = w4a16gen.open_checkpoint(folder)[name.removesuffix(".qzeros")].quantized().dequantize()
    np.testing.assert_array_equal(experts.gate_up.dequantize(torch.float64)[1, 256:].numpy(), wanted)


def test_scales_beyond_fp16_belong_to_their_expert(tmp_path: Path) -> None:
    original = tiny.tiny_model("mixtral", torch.bfloat16)
    plain = folder_with(tmp_path / "dense", original, None, {}, dense=("",))
    (plain / "config.json").write_text(json.dumps(original.config.to_dict()))
    quantize_model(plain, tmp_path / "int4", Settings(group_size=32))
    (file,) = (tmp_path / "int4").glob("*.safetensors")
    tensors = safetensors.load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.1.w2"
    tensors[f"{name}.weight_scale"] *= 2.0**-24
    safetensors.save_file(tensors, file, {"format": "pt"})
    convert(tmp_path / "int4", tmp_path / "packed")
    layer = w4a16gen.open_checkpoint(tmp_path / "int4")[name]
    wanted = layer.quantized().dequantize() * layer.alpha
    models = (
        from_pretrained(tmp_path / "int4", device="cpu"),
        from_pretrained(tmp_path / "packed", device="cpu"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
    )
    for model in models:
        down = model.model.layers[0].mlp.experts.down
        assert [alpha == 1 for alpha in down.alphas] == [True, False, True, True]
        assert np.abs(wanted).max() > 0
        np.testing.assert_array_equal(down.dequantize(torch.float64)[1].numpy(), wanted)
        assert torch.equal(model(tiny.tokens()).logits, models[0](tiny.tokens()).logits)


def test_progress_counts_the_experts_first(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    seen: list[tuple[int, int, str]] = []
    from_pretrained(folder, device="cpu", progress=lambda *step: seen.append(step))
    assert seen[:2] == [(i + 1, 2, f"model.layers.{i}.mlp.experts") for i in range(2)]
    assert [step[:2] for step in seen[2:]] == [(i + 1, 8) for i in range(8)]


def doubled(part: str, other: str) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name.replace(part, other)] = tensors[name].clone()

    return change


def test_experts_under_two_names_are_refused(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    changed(folder, doubled("layers.1.block_sparse_moe.experts.2.", "layers.1.mlp.experts.0."))
    convert(folder, tmp_path / "packed")
    message = r"experts of one layer as '.*layers.1.mlp.experts' and as '.*layers.1.block_sparse_moe.experts': keep"
    for path in (folder, tmp_path / "packed"):
        with pytest.raises(InvalidValueError, match=message):
            from_pretrained(path, device="cpu")
    with pytest.raises(InvalidValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("experts", ["experts.2.gate_proj", "experts."])
def test_experts_of_other_bits_are_named_with_the_bits(experts: str, tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("qwen2_moe"), tmp_path)

    def widened(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if experts in name]:
            if name.endswith("qweight"):
                tensors[name] = tensors[name].repeat(2, 1)
            elif name.endswith("qzeros"):
                tensors[name] = tensors[name].repeat(1, 2)

    changed(folder, widened)
    with pytest.raises(InvalidValueError, match=r"layer 'model\.layers\.0\.mlp\.experts.*' has 8 bits, not 4"):
        from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("slots", [0, 6])
def test_a_configuration_that_takes_more_experts_than_there_are_is_refused(slots: int, tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("qwen2_moe"), tmp_path)
    convert(folder, tmp_path / "packed")
    for place in (folder, tmp_path / "packed"):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": slots}))
    message = f"num_experts_per_tok of {slots} in config.json must be 1 to 5, the number of experts of model.layers.0"
    with pytest.raises(InvalidValueError, match=message):
        from_pretrained(folder, device="cpu")
    with pytest.raises(InvalidValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("trait", ["is_concatenated", "is_transposed"])
def test_experts_stored_in_another_way_are_not_filled(
    trait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny.tiny_model("mixtral")
    folder = gptq_folder(original, tmp_path)
    kind = type(original.model.layers[0].mlp.experts)
    init = kind.__init__

    def changed_init(self: Any, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        setattr(self, trait, trait == "is_transposed")

    monkeypatch.setattr(kind, "__init__", changed_init)
    with pytest.raises(InvalidValueError, match=r"lacks 4 parameters .* such as model\.layers\.0\.mlp\.experts"):
        from_pretrained(folder, device="cpu")


def test_dense_layers_lie_between_those_of_experts(tmp_path: Path) -> None:
    original = tiny.tiny_model("qwen3_moe", mlp_only_layers=[1], num_hidden_layers=4, decoder_sparse_step=1)
    model = from_pretrained(gptq_folder(original, tmp_path), device="cpu")
    assert model.w4a16gen_report.experts == tuple(f"model.layers.{i}.mlp.experts" for i in (0, 2, 3))
    assert model.w4a16gen_report.unused == ()
    got, wanted = model(tiny.tokens()).logits.float(), rounded_model(original)(tiny.tokens()).logits
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_numbers_of_experts_may_have_zeros_in_front(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    logits = from_pretrained(folder, device="cpu")(tiny.tokens()).logits

    def renamed(tensors: dict[str, Any]) -> None:
        doubled("experts.1.", "experts.01.")(tensors)
        without("experts.1.")(tensors)

    convert(changed(folder, renamed), tmp_path / "packed")
    for model in (
        from_pretrained(folder, device="cpu"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
    ):
        assert torch.equal(model(tiny.tokens()).logits, logits)


def test_a_head_of_its_own_is_used_though_the_configuration_says_that_it_is_tied(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path)
    convert(folder, tmp_path / "packed")
    logits = from_pretrained(folder, device="cpu")(tiny.tokens()).logits
    for place in (folder, tmp_path / "packed"):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        model = from_pretrained(place, device="cpu")
        assert torch.equal(model(tiny.tokens()).logits, logits)
        assert model.w4a16gen_report.unused == ()
    copied = "lm_head.weight", "model.embed_tokens.weight"
    changed(folder, lambda tensors: tensors.__setitem__(copied[0], tensors[copied[1]].clone()))
    model = from_pretrained(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight, "a copy of the embedding takes no memory"


def test_dense_forms_keep_the_mode_of_their_experts(tmp_path: Path) -> None:
    model = from_pretrained(gptq_folder(tiny.tiny_model("mixtral"), tmp_path), device="cpu")
    for training in (True, False):
        dense = copy.deepcopy(model).train(training).dequantize(torch.float16)
        assert {module.training for module in modules_of_experts(dense).values()} == {training}


def test_dense_experts_beyond_fp16_are_named(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path, dense="layers.0.block_sparse_moe.experts.1.w1")
    name = "model.layers.0.block_sparse_moe.experts.2.w3"
    changed(folder, lambda tensors: tensors[f"{name}.scales"].fill_(60000))
    with pytest.raises(InvalidValueError, match=rf"layer '{name}' is not finite in float16: pass dtype=torch.bfloat16"):
        from_pretrained(folder, device="cpu")
    from_pretrained(folder, device="cpu", dtype=torch.bfloat16)


def test_sizes_of_experts_that_stay_dense_are_compared(tmp_path: Path) -> None:
    folder = gptq_folder(tiny.tiny_model("mixtral"), tmp_path, dense="layers.0.block_sparse_moe.experts.1.w1")
    row = {key: torch.from_numpy(value) for key, value in plain_gptq_tensors("", np.ones((8, 128))).items()}
    name = "model.layers.0.block_sparse_moe.experts.2.w3"
    changed(folder, lambda tensors: tensors.update({f"{name}.{key}": value for key, value in row.items()}))
    with pytest.raises(InvalidValueError, match=rf"layer '{name}' of the checkpoint is \[8, 128\], but the model's is"):
        from_pretrained(folder, device="cpu")
