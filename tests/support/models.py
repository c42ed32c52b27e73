"""Tiny random models of every supported architecture, in the hub's folder layout, made without a network."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

ModelFolder = Callable[..., Path]  # what the fixture `model_folder` is
PAD, BOS, EOS = 256, 257, 258
VOCAB = 260
_COMMON = dict(vocab_size=VOCAB, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
_LLAMA = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
ARCHITECTURES = {
    "llama": _LLAMA | dict(tie_word_embeddings=True),
    "opt": dict(
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=8,
        dropout=0.1,
        attention_dropout=0.1,
        do_layer_norm_before=False,
    ),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=4, n_positions=128),
    "phi": dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attention_dropout=0.1,
    ),
    "gpt_neox": dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        attention_dropout=0.1,
        hidden_dropout=0.1,
    ),
    "qwen3": _LLAMA | dict(head_dim=8),
    "mistral": _LLAMA | dict(sliding_window=None),
    "falcon": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1, hidden_dropout=0.1
    ),
}
_GEMMA = _LLAMA | dict(head_dim=8, query_pre_attn_scalar=8)
_LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
)
FAMILIES = {  # more that are packed: windows, soft caps, attention sinks, scaled logits
    "qwen2": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "granite": _LLAMA | dict(logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0),
    "gemma2": _GEMMA | dict(sliding_window=16, attn_logit_softcapping=2.0, final_logit_softcapping=1.0),
    "gemma3_text": _GEMMA | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16),
    "gemma3": dict(  # of text and images
        text_config=_COMMON | _GEMMA | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        ),
        mm_tokens_per_image=4,
        image_token_index=259,
    ),
    "gpt_oss": _LLAMA
    | dict(
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
    ),
    "mistral (window)": _LLAMA | dict(sliding_window=16),
    "gemma3n_text": _GEMMA  # has several hidden states of a token; the last layers have the keys of earlier ones
    | dict(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "deepseek_v3": _LLAMA | _LATENT,  # caches what keys and values are computed of
}
UNPACKED = {  # architectures whose batches are padded: attention that cannot be replaced, recurrent layers
    "gpt_neo": dict(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=128,
    ),
    "bloom": dict(hidden_size=16, n_layer=2, n_head=4),
    "qwen3_5_text": _LLAMA
    | dict(
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "phi3 (longrope)": _LLAMA  # rows of more than 16 tokens have other rotary embeddings
    | dict(
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10_000.0,
            short_factor=[1.0, 1.2],
            long_factor=[4.0, 9.0],
            original_max_position_embeddings=16,
        ),
    ),
    "deepseek_v32": _LLAMA | _LATENT | dict(index_topk=8, index_head_dim=8, index_n_heads=16),  # reads chosen keys
    "doge": _LLAMA | dict(head_dim=4),  # makes a mask
    "llama4_text": _LLAMA  # its class states a wrong name of the backbone; queries are scaled by place
    | dict(
        head_dim=8,
        intermediate_size_mlp=32,
        num_local_experts=4,
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=64,
        no_rope_layers=[1, 0],
        floor_scale=4,
    ),
    "minimax": _LLAMA  # its linear layers read padding on the left
    | dict(head_dim=8, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=16),
    "mpt": dict(d_model=16, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2),
    "mamba": dict(hidden_size=16, state_size=4, num_hidden_layers=2),
    "lfm2": _LLAMA | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}
EXPERTS = {  # mixtures of experts whose configuration asks for the router's loss
    "mixtral": _LLAMA
    | dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1),
    "qwen3_moe": _LLAMA
    | dict(
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        output_router_logits=True,
        router_aux_loss_coef=0.2,
    ),
}


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, plus pad, BOS and EOS; BOS is prepended if asked, as llama's tokenizer does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def make_model_folder(
    folder: Path, architecture: str = "llama", *, seed: int = 0, bos: bool = True, scores: bool = False
) -> Path:
    """Save a random model of two layers and its tokenizer; weights are large enough to tell tokens apart.

    Args:
        folder: where it is saved.
        architecture: a name of `ARCHITECTURES`, `FAMILIES`, `UNPACKED` or `EXPERTS`; words behind the first are no part
            of the model's type.
        seed: of its weights.
        bos: the tokenizer prepends BOS.
        scores: it is a reward model.
    """
    torch.manual_seed(seed)
    options = (ARCHITECTURES | FAMILIES | UNPACKED | EXPERTS)[architecture]
    config = AutoConfig.for_model(architecture.split()[0], **_COMMON | options, **({"num_labels": 1} if scores else {}))
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer(bos=bos).save_pretrained(folder)
    return folder
