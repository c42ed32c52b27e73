"""Loading: what is refused, by which message; what is frozen, seeded and cast; what never runs."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, dynamic_module_utils

from sheeprlhf.agent.policy import Policy, load_policy
from sheeprlhf.agent.reward import reward_model_of
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.structure.model import HuggingFaceConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import ARCHITECTURES, VOCAB, ModelFolder, byte_tokenizer


def config(name: str | Path, **options: Any) -> ModelConfig:
    return ModelConfig(config_name="auto", repo_name=str(name), **options)


def load(name: str | Path, *, vocabulary: int = VOCAB, longest: int = 64, **options: Any) -> PreTrainedModel:
    return load_causal_lm(config(name, **options), vocabulary=vocabulary, longest=longest)


def copy_of(folder: Path, target: Path, *, without: str = "", **entries: Any) -> Path:
    """A copy of a model folder, without some files and with other entries in its config.json."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without))
    saved = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(saved | entries))
    return target


def test_names_that_are_no_model(tmp_path: Path) -> None:
    for name, message in {
        str(tmp_path): "this folder has no config.json",
        "../nowhere": "neither a folder nor a hub id",
        "a/b/c": "neither a folder nor a hub id",
        "embedded:nothing": "neither a folder nor a hub id",
        "": "no config.json|neither a folder nor a hub id",
    }.items():
        for attempt in (lambda name=name: load(name), lambda name=name: load_tokenizer(config(name))):
            with pytest.raises(ModelError, match=f"model.repo_name={name}.*({message})"):
                attempt()


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = copy_of(model_folder(), tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(config(folder))


def test_the_command_that_enlarges_a_reward_model_is_true(
    tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "small"
    AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=1).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)

    def scorer(name: Path, vocabulary: int) -> PreTrainedModel:
        auto = AutoModelForSequenceClassification
        return load_causal_lm(config(name), vocabulary=vocabulary, longest=64, auto=auto)

    with pytest.raises(ModelError, match=r"model\.repo_name=resized_model") as refused:
        scorer(folder, len(tokenizer))
    program, flag, script = shlex.split(str(refused.value).split("`")[1])
    assert (program, flag) == ("python", "-c")
    exec(script, {})
    enlarged = scorer(tmp_path / "resized_model", len(tokenizer))
    old, new = (model.get_input_embeddings().weight.detach() for model in (scorer(folder, VOCAB), enlarged))
    assert len(new) == len(tokenizer)
    assert torch.equal(new[: len(old)], old)


def test_a_model_that_is_too_small_is_refused(model_folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match=f" {VOCAB}, .* {VOCAB} rows"):
        load(model_folder(), vocabulary=VOCAB + 1)
    for architecture in ("llama", "opt", "gpt2"):
        load(model_folder(architecture), longest=128)
        with pytest.raises(ModelError, match=r"data\.max_length.*data\.max_length=128"):
            load(model_folder(architecture), longest=129)


def test_only_the_head_is_trained(model_folder: ModelFolder) -> None:
    model = load(model_folder("phi"), freeze_transformer=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["lm_head.weight", "lm_head.bias"]
    with pytest.raises(ModelError, match=r"model\.freeze_transformer=false"):
        load(model_folder("llama"), freeze_transformer=True)


def test_the_heads_width(model_folder: ModelFolder) -> None:
    load(model_folder("opt"), embedding_dim_name="word_embed_proj_dim")
    load(model_folder("gpt2"), embedding_dim_name="n_embd")
    options = {"vocabulary": VOCAB, "longest": 64, "auto": AutoModelForSequenceClassification}
    for name, width in (("opt", "word_embed_proj_dim"), ("gpt2", "n_embd")):  # as reward models are loaded
        load_causal_lm(config(model_folder(name), embedding_dim_name=width, random_init=True), **options)
    for name, stated in (("hidden_size", "16"), ("nothing", "None")):
        with pytest.raises(ModelError, match=f"embedding_dim_name={name}: .* says {stated}, .* vectors of 8"):
            load(model_folder("opt"), embedding_dim_name=name)


def test_the_stated_number_format_holds(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = copy_of(model_folder(), tmp_path / "model", dtype="bfloat16")
    for dtype in ("float32", "bfloat16", "float16"):
        for random_init in (False, True):
            model = load(folder, dtype=dtype, random_init=random_init)
            assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_random_weights_come_from_the_seed_and_need_no_file(tmp_path: Path, model_folder: ModelFolder) -> None:
    folder = copy_of(model_folder(), tmp_path / "model", without="*.safetensors")
    with pytest.raises(ModelError, match="no weights"):
        load(folder)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.detach().flatten() for p in load(folder, random_init=True).parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "phi", "falcon"])
def test_checkpointing_computes_each_layer_twice_and_the_same(architecture: str, model_folder: ModelFolder) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(model_folder(architecture), gradient_checkpointing=checkpointing)
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
        calls: list[int] = []
        next(layer.children()).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=torch.arange(9)[None], use_cache=False).logits.square().mean().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_saved_model_carries_nothing_of_ours(architecture: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    policy = Policy(load(model_folder(architecture)))
    policy.save(tmp_path, byte_tokenizer())
    for file in tmp_path.glob("*.json"):
        assert "sheeprlhf" not in file.read_text() and "_attn_implementation" not in file.read_text(), file


@pytest.fixture
def booby_trap(tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model folder whose own code and pickle each write a file; and that file."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    sentinel = tmp_path / "sentinel"
    code = f"open({str(sentinel)!r}, 'w').close()\n"
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    folder = copy_of(model_folder(), tmp_path / "trap", auto_map=auto)
    (folder / "own.py").write_text(code + "from transformers import LlamaConfig\nclass Own(LlamaConfig): pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, sentinel


def test_code_of_a_folder_never_runs(booby_trap: tuple[Path, Path]) -> None:
    folder, sentinel = booby_trap
    load_tokenizer(config(folder))
    load(folder)
    load(folder, random_init=True)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"model_type": "own"}))  # no code of transformers fits
    for attempt in (load, lambda folder: load(folder, random_init=True)):
        with pytest.raises(ModelError, match="cannot be loaded"):
            attempt(folder)
    assert not sentinel.exists()


def test_code_of_a_folder_runs_once_it_is_trusted(booby_trap: tuple[Path, Path]) -> None:
    """That the trap above works."""
    folder, sentinel = booby_trap
    with pytest.raises((ModelError, AttributeError, TypeError)):  # the trap is no model
        load(folder, library_cfg=HuggingFaceConfig(trust_remote_code=True))
    assert sentinel.exists()


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(
    ("files", "options", "saved"),
    [
        ("bfloat16", {}, "bfloat16"),
        ("bfloat16", {"save_dtype": "float32"}, "float32"),
        ("bfloat16", {"dtype": "bfloat16"}, "bfloat16"),
        ("float32", {}, "float32"),
        ("float32", {"save_dtype": "float16"}, "float16"),
    ],
)
def test_a_whole_model_is_saved_in_the_number_format_of_its_files(
    files: str, options: dict[str, str], saved: str, scores: bool, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """Rounded once when it is saved; plain transformers reads the same numbers, and the trained weights stay."""
    AutoModelForCausalLM.from_pretrained(model_folder(), dtype=getattr(torch, files)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    cfg = ModelConfig(config_name="auto", repo_name=str(tmp_path / "base"), **options)
    tokenizer = load_tokenizer(cfg)
    policy = load_policy(cfg, tokenizer, longest=64, batching="auto")
    trained = reward_model_of(policy, cfg, tokenizer) if scores else policy
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    before = {name: weight.clone() for name, weight in trained.model.named_parameters()}
    trained.save(tmp_path / "final", tokenizer)
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "final", dtype="auto")
    assert str(again.dtype) == f"torch.{saved}"
    for name, weight in again.named_parameters():
        assert torch.equal(weight, before[name].to(weight.dtype)), name
        assert weight.dtype == getattr(torch, saved) or options.get("dtype")
    assert all(torch.equal(weight, before[name]) for name, weight in trained.model.named_parameters())
