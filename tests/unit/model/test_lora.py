"""Adapters: where they go, what trains, and their formula."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sheeprlhf.agent.policy import Policy
from sheeprlhf.config.path_checks import model_problem
from sheeprlhf.model.adapter import add_lora, load_lora, merge_lora
from sheeprlhf.model.folder.account import HEAD
from sheeprlhf.model.folder.load import load_causal_lm, with_score_head
from sheeprlhf.security.model_folder import MERGED
from sheeprlhf.structure.model import LORAConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.security.guard import Payload
from tests.support.models import VOCAB, ModelFolder, byte_tokenizer

LLAMA_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.arange(11)[None]


def adapted(folder: Path, targets: Any = "all-linear", *, dtype: str = "float32", **options: Any) -> PeftModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), dtype=dtype)
    model = load_causal_lm(cfg, vocabulary=VOCAB, longest=64)
    return add_lora(model, LORAConfig(targets=targets, **options))


def adapted_layers(model: PeftModel) -> set[str]:
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("all-linear", LLAMA_LINEAR),
        ("All-Linear", LLAMA_LINEAR),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("('q_proj','v_proj')", {"q_proj", "v_proj"}),
        ("q_proj, up_proj", {"q_proj", "up_proj"}),
        (["self_attn.k_proj"], {"k_proj"}),
        (r".*\.[kv]_proj", {"k_proj", "v_proj"}),
        (["q_proj", r".*mlp\.(up|down)_proj"], {"q_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets(targets: Any, layers: set[str], model_folder: ModelFolder) -> None:
    model = adapted(model_folder(), targets)
    assert adapted_layers(model) == layers
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * len(layers)  # both layers of the model


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"q_prj; .*q_proj\? .*down_proj, .*'all-linear'"),
        (["q_proj", "zzz"], r"is named zzz\. This model"),
        (["proj"], r"is named proj[.;]"),  # a part of a name is no name
        (["embed_tokens"], r"is named embed_tokens[.;]"),
        ([r".*\.xyz$"], r"is named \.\*.*xyz"),
    ],
)
def test_unknown_targets_are_named(targets: list[str], message: str, model_folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match=message):
        adapted(model_folder(), targets)


def test_adapters_are_float32_on_a_half_precision_model(model_folder: ModelFolder) -> None:
    model = adapted(model_folder(), dtype="bfloat16")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


@pytest.mark.parametrize(("architecture", "left_out"), [("mamba", "out_proj"), ("llama4_text", "router")])
def test_all_linear_leaves_out_layers_that_peft_does_not_adapt(
    architecture: str, left_out: str, model_folder: ModelFolder
) -> None:
    model = adapted(model_folder(architecture))
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert left_out in linear and left_out not in adapted_layers(model) and "lm_head" not in adapted_layers(model)
    perturb(model)
    with torch.no_grad():
        adapted_logits = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert not torch.equal(adapted_logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi", "falcon"])
def test_new_adapters_change_nothing(architecture: str, model_folder: ModelFolder) -> None:
    """Trap 7: a new adapter, and one that is switched off, is the model itself bit for bit, dropout or not."""
    model = adapted(model_folder(architecture), dropout=0.5).train()
    plain = ModelConfig(config_name="auto", repo_name=str(model_folder(architecture)))
    expected = load_causal_lm(plain, vocabulary=VOCAB, longest=64)(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, expected)
    perturb(model)
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def perturb(model: PeftModel) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize(("architecture", "layer"), [("llama", "q_proj"), ("gpt2", "c_attn")])
def test_the_formula(architecture: str, layer: str, model_folder: ModelFolder) -> None:
    """y = W x + alpha / rank * B A x, for GPT-2's Conv1D (weights transposed) too."""
    model = adapted(model_folder(architecture), [layer], rank=3, alpha=6.0)
    perturb(model)
    module = next(m for name, m in model.named_modules() if name.endswith(f".{layer}"))
    assert module.fan_in_fan_out == (architecture == "gpt2")
    inputs = torch.randn(2, 5, 16)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert_close(module(inputs), module.base_layer(inputs) + 2.0 * inputs @ a.T @ b.T, rtol=0, atol=1e-5)


def test_saved_adapters_are_read_back_frozen(tmp_path: Path, model_folder: ModelFolder) -> None:
    model = adapted(model_folder("gpt2"))
    perturb(model)
    Policy(model).save(tmp_path, byte_tokenizer())
    assert not list(tmp_path.glob("model*.safetensors"))
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 1  # PEFT writes a set, in the order of this process's hashes
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder("gpt2")))
    again = load_lora(load_causal_lm(cfg, vocabulary=VOCAB, longest=64), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    other = load_causal_lm(ModelConfig(config_name="auto", repo_name=str(model_folder())), vocabulary=VOCAB, longest=64)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="adapters"):
            load_lora(other, folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_adapters_are_converted_once_without_running_code(
    zipped: bool, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT of old has written adapter_model.bin."""
    monkeypatch.setenv("SHEEPRLHF_CACHE", str(tmp_path / "cache"))
    model, folder = adapted(model_folder("gpt2")), tmp_path / "adapters"
    perturb(model)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    pickled = folder / "adapter_model.bin"
    torch.save(tensors, pickled, _use_new_zipfile_serialization=zipped)
    said: list[str] = []
    for _ in range(2):
        again = load_lora(loaded(model_folder("gpt2")), folder, said.append)
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert len(said) == 1 and str(folder) in said[0]
    torch.save({"base_model.model.x.lora_A.weight": Payload(tmp_path / "ran")}, pickled)
    with pytest.raises(ModelError, match=r"adapter_model\.bin"):
        load_lora(loaded(model_folder("gpt2")), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("scores", [False, True])
def test_the_advice_for_adapters_alone_makes_a_whole_model(
    scores: bool, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command is followed to the letter, for a pickle of old; the model scores or writes as with its adapters."""
    plain = loaded(model_folder("gpt2"))
    base = with_score_head(plain, 0) if scores else plain
    model, folder = add_lora(base, LORAConfig(), head=HEAD if scores else None), tmp_path / "it's old"
    perturb(model)
    expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    problem = str(model_problem(str(folder), weights=True))
    assert problem == model_problem(str(folder), weights=True, key="reward.folder").replace(
        "reward.folder", "model.repo_name"
    )
    program, flag, script = shlex.split(problem.split("`")[1])
    assert (program, flag) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    whole = auto.from_pretrained(tmp_path / MERGED).eval()
    assert model_problem(str(tmp_path / MERGED), weights=True) is None
    assert_close(whole(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)


def loaded(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), dtype=dtype)
    return load_causal_lm(cfg, vocabulary=VOCAB, longest=64).eval()


@pytest.mark.parametrize(("architecture", "layer"), [("llama", "q_proj"), ("gpt2", "c_attn"), ("phi", "lm_head")])
def test_merged_adapters_compute_what_they_computed_beside(
    architecture: str, layer: str, model_folder: ModelFolder
) -> None:
    """The head of phi is not tied: an adapter there is allowed."""
    model = adapted(model_folder(architecture), [layer]).eval()
    perturb(model)
    expected = model(input_ids=IDS).logits
    merged = merge_lora(model)
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    assert_close(merged.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
    assert merged.difference < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_half_precision_is_no_wrong_merge(dtype: str, model_folder: ModelFolder) -> None:
    model = adapted(model_folder(), dtype=dtype).eval()
    perturb(model)
    assert merge_lora(model).difference > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
@pytest.mark.parametrize("targets", [["lm_head"], "lm_head,{layer}"])
def test_adapters_on_a_tied_weight_are_rejected(
    architecture: str, targets: str | list[str], model_folder: ModelFolder
) -> None:
    layer = {"llama": "q_proj", "gpt2": "c_attn", "opt": "q_proj", "falcon": "query_key_value"}[architecture]
    fix = "all-linear" if isinstance(targets, list) else rf"'model.lora_cfg.targets=\[{layer}\]'"
    with pytest.raises(ModelError, match=f"model.lora_cfg.targets: lm_head shares .*{fix}"):
        adapted(model_folder(architecture), targets if isinstance(targets, list) else targets.format(layer=layer))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_a_tied_weight_made_elsewhere_are_not_merged(
    target: str, dtype: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    """They are read: beside the weights they compute what they were trained to."""
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=getattr(torch, dtype)),
        LoraConfig(task_type="CAUSAL_LM", target_modules=[target, "q_proj"], init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_lora(loaded(model_folder(), dtype), tmp_path)
    assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5 if "32" in dtype else 0.1)
    with pytest.raises(ModelError, match=rf"outputs differ.*|{target} shares its weight.*model.lora_cfg.targets"):
        merge_lora(ours)


@pytest.mark.parametrize("scores", [False, True])
def test_a_merge_that_computes_something_else_is_an_error(
    scores: bool, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = with_score_head(loaded(model_folder()), 0) if scores else loaded(model_folder())
    model = add_lora(base, LORAConfig(), head=HEAD if scores else None)
    perturb(model)
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)  # without the adapters
    with pytest.raises(ModelError, match="outputs differ by"):
        merge_lora(model)


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dict(use_rslora=True, rank=4), dict(use_rslora=True, r=4)),
    (dict(use_dora=True), dict(use_dora=True)),
    (dict(init="gaussian"), dict(init_lora_weights="gaussian")),
    (dict(init="orthogonal"), dict(init_lora_weights="orthogonal")),
    (dict(targets=["q_proj"], layers_to_transform=[1]), dict(target_modules=["q_proj"], layers_to_transform=[1])),
    (dict(targets=r".*1\.mlp\.\w+_proj"), dict(target_modules=r".*1\.mlp\.\w+_proj")),
    (dict(modules_to_save=["embed_tokens"]), dict(modules_to_save=["embed_tokens"])),
]


ADAPTED = [("qwen2", *options) for options in OPTIONS]
ADAPTED += [(name, {}, {}) for name in ("mixtral", "qwen3_moe", "deepseek_v3")]  # PEFT adds adapters to the experts


@pytest.mark.parametrize(("architecture", "ours", "theirs"), ADAPTED)
def test_options_compute_save_and_merge_as_plain_peft_does(
    architecture: str, ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path, model_folder: ModelFolder
) -> None:
    """The saved adapters give plain PEFT, our reader and the merged model the outputs that were trained."""
    folder = model_folder(architecture)
    torch.manual_seed(0)
    expected = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **{"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | theirs),
    ).eval()
    torch.manual_seed(0)
    model = adapted(folder, ours.get("targets", "all-linear"), **{k: v for k, v in ours.items() if k != "targets"})
    by_name = dict(model.named_parameters())
    for name, weight in expected.named_parameters():
        assert by_name[name].requires_grad == weight.requires_grad
        assert_close(by_name[name], weight, rtol=0, atol=0)
    base = loaded(folder)(input_ids=IDS).logits
    assert_close(model.eval()(input_ids=IDS).logits, base, rtol=0, atol=1e-5)
    for changed in (model, expected):
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in changed.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.05)
    trained = expected(input_ids=IDS).logits
    assert float((trained - base).detach().abs().max()) > 0.01
    assert_close(model(input_ids=IDS).logits, trained, rtol=0, atol=1e-5)
    Policy(model).save(tmp_path, byte_tokenizer())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path)
    for again in (plain.eval(), load_lora(loaded(folder), tmp_path), merge_lora(model).model):
        assert_close(again(input_ids=IDS).logits, trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(modules_to_save=["norn"]), "norm"),
        (dict(modules_to_save=["lm_head"]), "embed_tokens"),
        (dict(modules_to_save=["mlp"]), "model.lora_cfg.targets"),
        (dict(targets=["q_proj"], modules_to_save=["self_attn"]), "model.lora_cfg.targets"),
        (dict(layers_to_transform=[1, 2]), "0 to 1"),
    ],
)
def test_options_that_the_model_excludes(options: dict[str, Any], named: str, model_folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match=named):
        adapted(model_folder(), **options)


@pytest.mark.parametrize("change", ["missing", "misplaced"])
def test_every_tensor_of_an_adapter_is_accounted_for(change: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """PEFT leaves a tensor that is missing as it was initialised, and leaves out one without a place."""
    adapted(model_folder()).save_pretrained(tmp_path)
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors = load_file(path)
    if change == "misplaced":
        tensors[name := name.replace("layers.1", "layers.2")] = torch.ones(32, 16)
    else:
        del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    model = load_causal_lm(ModelConfig(config_name="auto", repo_name=str(model_folder())), vocabulary=VOCAB, longest=64)
    with pytest.raises(ModelError, match=f"adapters cannot be loaded.*{name}"):
        load_lora(model, tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(targets="all-linear"), 14),
        (dict(targets=["q_proj"]), 2),
        (dict(targets=["q_proj"], layers_to_transform=[1]), 1),
        (dict(targets="all-linear", layers_to_transform=[0]), 7),
    ],
)
def test_only_what_text_passes_through_is_trained(
    options: dict[str, Any], expected: int, model_folder: ModelFolder
) -> None:
    """A part for images has layers of the same names; where a weight gets no gradient, DDP ends with an error."""
    model = loaded(model_folder("gemma3"))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    model(input_ids=IDS).logits.sum().backward()
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and any("vision" in name for name, _ in model.named_parameters())
    adapters = [name for name, _ in add_lora(model, LORAConfig(**options)).named_parameters() if "lora_A" in name]
    assert len(adapters) == expected and not any("vision" in name for name in adapters)
