"""Every parameter comes from the files, which may keep them: what is missing, misplaced or not read is named."""

import copy
import json
import shutil
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from sheeprlhf.agent.reward import load_reward_model
from sheeprlhf.data.example import Example, collate_padded
from sheeprlhf.model.folder.file_parameters import FileParameter, content, drop_placeholders
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.model.folder.weights import check_weights, num_positions
from sheeprlhf.structure.model import AutoModelConfig, HuggingFaceConfig, ModelConfig
from sheeprlhf.utils.errors import ModelError
from tests.support.models import PAD, UNPACKED, VOCAB, ModelFolder, byte_tokenizer, make_model_folder

WEIGHTS = "model.safetensors"


def spoilt(
    folder: Path, target: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """A copy of a folder without a tensor, with other ones, or with other entries in config.json (None: left out)."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / WEIGHTS)
    drop = {"lm_head.weight": "embed_out.weight"}.get(drop, drop) if "embed_out.weight" in tensors else drop
    assert not drop or drop in tensors
    save_file({k: v for k, v in tensors.items() if k != drop} | (add or {}), target / WEIGHTS, {"format": "pt"})
    saved = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if v is not None}))
    return target


def messages(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> list[str]:
    """What the check of the headers and the loading of the weights say; nothing for one that is fine."""
    cfg, said = ModelConfig(config_name="auto", repo_name=str(folder)), []
    for attempt in (
        lambda: check_weights(cfg, auto=auto, **options),
        lambda: load_causal_lm(cfg, vocabulary=VOCAB, longest=64, auto=auto, **options),
    ):
        try:
            attempt()
        except ModelError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),  # and with it the tied head
        ("qwen3", "lm_head.weight"),
        ("phi", "lm_head.bias"),
        ("gpt_neox", "lm_head.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("opt", "model.decoder.layers.0.self_attn_layer_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(architecture: str, name: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    found = messages(spoilt(model_folder(architecture), tmp_path / "model", drop=name))
    assert len(found) == 2 and all(name in text and "model.repo_name=" in text for text in found)


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Linear(config.hidden_size, 1)
"""


def own_folder(folder: Path, target: Path, *, drop: str = "") -> Path:
    """A model whose class comes with it."""
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    gate = {"gate.weight": torch.ones(1, 16), "gate.bias": torch.ones(1)}
    spoilt(folder, target, drop=drop, add=gate, model_type="own", auto_map=classes, architectures=["OwnModel"])
    (target / "own.py").write_text(OWN_CODE)
    return target


@pytest.mark.parametrize("drop", ["", "model.layers.1.mlp.up_proj.weight"])
def test_weights_of_a_model_with_its_own_code_are_accounted_for_by_the_headers(
    drop: str, tmp_path: Path, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own_folder(model_folder(), tmp_path / f"own{len(drop)}", drop=drop)
    library = HuggingFaceConfig(trust_remote_code=True, revision="0" * 40)
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), library_cfg=library)
    if not drop:
        assert check_weights(cfg) == ""
        return
    with pytest.raises(ModelError, match=rf"model.repo_name={folder}: .*{drop} is missing"):
        check_weights(cfg)


def test_a_head_that_the_task_replaces_may_be_missing(tmp_path: Path, model_folder: ModelFolder) -> None:
    assert messages(spoilt(model_folder("qwen3"), tmp_path / "a", drop="lm_head.weight"), new_head=True) == []
    assert messages(spoilt(model_folder("gpt_neox"), tmp_path / "b", drop="lm_head.weight"), new_head=True) == []
    hole = spoilt(model_folder("qwen3"), tmp_path / "c", drop="model.norm.weight")
    assert all("model.norm.weight" in text for text in messages(hole, new_head=True))


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "model.norm.bias", "lm_head.bias"],
)
def test_a_tensor_of_a_layer_without_a_place_for_it_is_named(
    name: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    """The configuration is not that of the weights: they would compute something else."""
    found = messages(spoilt(model_folder(), tmp_path / "model", add={name: torch.ones(16)}))
    assert len(found) == 2 and all(name in text for text in found)


@pytest.mark.parametrize("architecture", ["bert", "bart", "xlnet", "t5", "qwen2_vl"])
def test_what_is_no_causal_language_model_is_rejected_by_its_configuration(
    architecture: str, tmp_path: Path, model_folder: ModelFolder
) -> None:
    folder = spoilt(model_folder(), tmp_path / "model")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "d_model": 16, "n_layer": 2, "n_head": 4}
    AutoConfig.for_model(architecture, **sizes if architecture in ("bert", "xlnet") else {}).save_pretrained(folder)
    said = messages(folder)
    assert len(said) == 2 and all(architecture in line and f"model.repo_name={folder}" in line for line in said)


def test_the_text_of_a_model_that_also_reads_images_is_loaded_alone(tmp_path: Path) -> None:
    """Its configuration has that of the text inside, with the number of positions."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    text = UNPACKED["qwen3_5_text"] | {"vocab_size": VOCAB, "max_position_embeddings": 64}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision | {"num_position_embeddings": 16})
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    cfg, ids = ModelConfig(config_name="auto", repo_name=str(tmp_path)), torch.arange(30)[None]
    assert check_weights(cfg) == "" and num_positions(cfg) == 64
    model, in_files = (load_causal_lm(cfg, vocabulary=VOCAB, longest=64, in_files=kept) for kept in (False, True))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, whole(ids).logits, rtol=0, atol=1e-6)
    for weight, kept in zip(model.parameters(), in_files.parameters(), strict=True):
        assert isinstance(kept, FileParameter) and torch.equal(content(kept), weight)
    with pytest.raises(ModelError, match=r"data\.max_length=64"):
        load_causal_lm(cfg, vocabulary=VOCAB, longest=65)


@pytest.mark.parametrize("name", ["w1", "w2"])
def test_a_missing_expert_is_named(name: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    """Transformers joins the experts' tensors into one."""
    config = AutoConfig.from_pretrained(model_folder()).to_dict()
    kept = {key: config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    mixtral = AutoConfig.for_model("mixtral", **kept, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4)
    shutil.copytree(model_folder(), tmp_path / "whole", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(tmp_path / "whole")
    assert messages(tmp_path / "whole") == []
    expert = f"model.layers.1.block_sparse_moe.experts.3.{name}.weight"
    found = messages(spoilt(tmp_path / "whole", tmp_path / "model", drop=expert))
    assert len(found) == 2 and expert in found[0]


def test_what_is_not_read_is_reported_once_and_changes_nothing(tmp_path: Path, model_folder: ModelFolder) -> None:
    add = {"score.weight": torch.ones(1, 16), "vision.patch.weight": torch.ones(2)}
    add |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}  # as of old
    folder = spoilt(model_folder(), tmp_path / "model", add=add)
    said: list[str] = []
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    model = load_causal_lm(cfg, vocabulary=VOCAB, longest=64, say=said.append)
    [line] = said
    assert "score.weight" in line and "vision.patch.weight" in line and "inv_freq" not in line and "\n" not in line
    assert check_weights(cfg) in line
    for name, tensor in load_file(model_folder() / WEIGHTS).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_half_precision_that_is_not_kept_is_reported_with_the_option(tmp_path: Path, model_folder: ModelFolder) -> None:
    shutil.copytree(model_folder(), tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float16):
        AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype).save_pretrained(tmp_path / "model")
        name = str(dtype).removeprefix("torch.")
        for wanted, lines in (("float32", 1), (name, 0)):
            said: list[str] = []
            cfg = ModelConfig(config_name="auto", repo_name=str(tmp_path / "model"), dtype=wanted)
            load_causal_lm(cfg, vocabulary=VOCAB, longest=64, say=said.append)
            assert len(said) == lines and all(f"model.dtype={name}" in line for line in said)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as plain transformers saves it."""
    from tests.support.models import _COMMON, _LLAMA

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("reward") / "model"
    config = AutoConfig.for_model("llama", **_COMMON | _LLAMA, num_labels=1, tie_word_embeddings=False)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def scores(folder: Path) -> torch.Tensor:
    """Of two texts, by our reward model."""
    cfg = ModelConfig(config_name="auto", repo_name=str(folder))
    tokenizer = load_tokenizer(cfg)
    model = load_reward_model(cfg, tokenizer, longest=64, batching="padded")
    prompts = ([1, 2, 3], [4, 5, 6, 7])
    rows = [Example(0, np.array(ids[:1], np.int32), (np.array(ids[1:], np.int32),)) for ids in prompts]
    with torch.no_grad():
        return model.eval()(collate_padded(rows, pad_id=PAD, targets="last"))


@pytest.fixture(scope="module")
def expected(reward_folder: Path) -> torch.Tensor:
    """The same by plain transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, 0] for ids in ([1, 2, 3], [4, 5, 6, 7])]
    return torch.stack(found)


def test_a_bias_of_the_head_is_added(reward_folder: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    folder = spoilt(reward_folder, tmp_path / "model", add={"score.bias": torch.tensor([0.7])})
    torch.testing.assert_close(scores(folder), expected + 0.7, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"drop": "score.weight"}, ["score.weight"]),
        (
            {"drop": "score.weight", "add": {"value_head.weight": torch.ones(1, 16)}},
            ["score.weight", "value_head.weight"],
        ),
        ({"drop": "score.weight", "add": {"v_head.summary.weight": torch.ones(1, 16)}}, ["v_head.summary.weight"]),
        ({"drop": "score.weight", "add": {"regression_layer.weight": torch.ones(9, 16)}}, ["regression_layer.weight"]),
        ({"drop": "score.weight", "add": {"ranker.weight": torch.ones(1, 16)}}, ["score.weight", "ranker.weight"]),
        ({"drop": "score.weight", "add": {"lm_head.weight": torch.ones(9, 16)}}, ["lm_head.weight", "task=rm"]),
        ({"add": {"score.weight": torch.ones(2, 16)}, "id2label": {"0": "a", "1": "b"}}, ["2 labels"]),
        ({"add": {"score.weight": torch.ones(2, 16)}, "id2label": None, "label2id": None}, ["2 labels"]),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, ["states 2 labels", "score.weight"]),
        ({"add": {"score.weight": torch.ones(1, 8)}}, ["score.weight", "(1, 8)", "(1, 16)"]),
        ({"add": {"score.bias": torch.ones(2)}}, ["score.bias"]),
        ({"drop": "model.norm.weight"}, ["model.norm.weight"]),
        ({"architectures": ["LlamaForRewardModelWithGating"]}, ["LlamaForRewardModelWithGating"]),
        ({"architectures": ["LlamaForTokenClassification"]}, ["LlamaForTokenClassification"]),
        ({"auto_map": {"AutoModelForSequenceClassification": "own.Own"}}, ["code"]),
    ],
)
def test_what_is_no_reward_model_is_rejected_by_name(
    change: dict[str, Any], named: list[str], reward_folder: Path, tmp_path: Path
) -> None:
    found = messages(spoilt(reward_folder, tmp_path / "model", **change), AutoModelForSequenceClassification)
    assert len(found) == 2 and all(name in text for text in found for name in named)


def load(folder: Path, *, in_files: bool, **options: object) -> tuple[torch.nn.Module, list[str]]:
    said: list[str] = []
    cfg = AutoModelConfig(repo_name=str(folder), **options)
    return load_causal_lm(cfg, vocabulary=260, longest=64, in_files=in_files, say=said.append), said


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_model_in_files_is_the_loaded_one(architecture: str, model_folder: ModelFolder) -> None:
    (whole, _), (ours, said) = (load(model_folder(architecture), in_files=in_files) for in_files in (False, True))
    assert said == []
    expected, found = whole.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    assert list(found) == list(expected)
    assert all(isinstance(tensor, FileParameter) for tensor in found.values())
    for name, tensor in expected.items():
        assert torch.equal(content(found[name]), tensor.detach())
        assert not torch.equal(found[name].detach(), tensor.detach()) or tensor.ndim == 1
    for ours_buffer, buffer in zip(ours.buffers(), whole.buffers(), strict=True):
        assert torch.equal(ours_buffer, buffer)
    assert ours.generation_config.to_dict() == whole.generation_config.to_dict()
    assert ours.name_or_path == whole.name_or_path


def test_copies_and_tied_weights_stay_in_files(model_folder: ModelFolder) -> None:
    model = copy.deepcopy(load(model_folder(), in_files=True)[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sources = drop_placeholders(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(sources) == {name for name, _ in model.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    expected = load_file(model_folder() / "model.safetensors")[name]
    part = (slice(5, 12), slice(2, 9))
    assert torch.equal(sources[name].read(part), expected[part])


@pytest.mark.parametrize("options", [{"resize_embeddings": True}, {}], ids=["resized", "experts"])
def test_weights_that_are_computed_are_loaded(options: dict[str, bool], tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "llama" if options else "mixtral")
    model, said = load(folder, in_files=True, **options)
    assert len(said) == 1
    assert not any(isinstance(parameter, FileParameter) for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_are_read_in_the_models_format(dtype: str, tmp_path: Path, model_folder: ModelFolder) -> None:
    copytree(model_folder(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    model, _ = load(tmp_path / "model", in_files=True, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(content(parameter), halves[name].to(getattr(torch, dtype)))


def test_missing_weights_are_reported_alike(tmp_path: Path, model_folder: ModelFolder) -> None:
    copytree(model_folder(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": torch.ones(3), "model.layers.7.x": torch.ones(1)}, path, {"format": "pt"})
    messages = []
    for in_files in (False, True):
        with pytest.raises(ModelError) as caught:
            load(tmp_path / "model", in_files=in_files)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "model.norm.weight" in messages[0]


def test_a_reward_model_stays_in_its_files(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", scores=True)
    cfg = AutoModelConfig(repo_name=str(folder))
    auto = AutoModelForSequenceClassification
    model = load_causal_lm(cfg, vocabulary=260, longest=64, auto=auto, in_files=True)
    assert torch.equal(content(model.score.weight), load_file(folder / "model.safetensors")["score.weight"])
