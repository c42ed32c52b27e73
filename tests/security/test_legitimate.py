"""What people really have still loads: the hub's cache, shards, adapters of plain PEFT, templates of real models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sheeprlhf.model.adapter import load_lora
from sheeprlhf.model.folder.load import load_tokenizer
from sheeprlhf.security.model_folder import check_templates, read_header, tensors_of
from sheeprlhf.structure.model import ModelConfig
from tests.security.folders import assert_is, model_of

IDS = torch.arange(9)[None]
TEMPLATES = {
    "markers": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "strict": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}{{ m['content'] | trim + eos_token }}{% endfor %}",
    "tools": "{%- set ns = namespace(tool=false) -%}{%- if tools is not none and tools -%}"
    "{{ tools | tojson(indent=2) }}{%- endif -%}{%- for m in messages -%}{%- if m.role == 'tool' -%}{%- continue -%}"
    "{%- endif -%}"
    "{% generation %}{{ m.content }}{% endgeneration %}{%- endfor -%}{{ strftime_now('%d %b %Y') }}",
    "mistaken": "{{ messages[0]['content'] + 1 }}",
    "torn": "{% for m in messages %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_as_models_have_them(name: str) -> None:
    """A mistake in one is told when it is used, by who uses it."""
    check_templates(SimpleNamespace(chat_template={"default": TEMPLATES[name], "tool_use": "x"}), "model")
    check_templates(SimpleNamespace(chat_template=None), "model")


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path, model_folder) -> None:
    """Links from the snapshot to the blobs beside it, and a link of the user's to the snapshot."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_folder().iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_is(model_of(snapshot), model_folder())
    (tmp_path / "mine").symlink_to(snapshot)
    assert_is(model_of(tmp_path / "mine"), model_folder())


def test_a_header_is_what_the_file_has(tmp_path: Path) -> None:
    formats = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)
    tensors = {f"a.{i}": torch.zeros(i, 3, dtype=dtype) for i, dtype in enumerate(formats)}
    save_file({**tensors, "scalar": torch.tensor(1.0)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    facts = read_header(tmp_path / "x.safetensors")
    assert {name: fact.shape for name, fact in facts.items()} == {
        **{name: tuple(tensor.shape) for name, tensor in tensors.items()},
        "scalar": (),
    }
    assert [facts[f"a.{i}"].dtype for i in range(7)] == ["F32", "BF16", "F16", "I64", "BOOL", "U8", "F8_E4M3"]
    assert tensors_of(tmp_path, "x.safetensors") == facts


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj"], "use_dora": True, "bias": "lora_only"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_adapters_of_plain_peft(options: dict, tmp_path: Path, model_folder) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder()), LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder()), tmp_path)
    assert not torch.equal(expected(IDS).logits, base(IDS).logits)
    loaded = load_lora(base, tmp_path)
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert loaded.peft_config["default"].base_model_name_or_path == str(model_folder())


def test_usual_entries_of_configurations(tmp_path: Path, model_folder) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    for name, entries in {
        "config.json": {
            "auto_map": {"AutoConfig": "own.Own"},
            "_attn_implementation_autoset": True,
            "torch_dtype": "bfloat16",
            "_name_or_path": "/home/somebody/model",
        },
        "tokenizer_config.json": {
            "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
            "tokenizer_file": None,
            "model_max_length": 10**30,
            "trust_remote_code": False,
        },
    }.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    (folder / "README.md").symlink_to("/etc/hostname")  # never opened either
    model_of(folder)
    tokenizer = load_tokenizer(ModelConfig(config_name="auto", repo_name=str(folder)))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    model_of(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
