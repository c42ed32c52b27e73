"""Sampling against a loop without cache, batch or padding, and what it must not depend on or change."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from sheeprlhf.agent.policy import Policy
from sheeprlhf.data.example import Example, collate_packed
from sheeprlhf.model.adapter import add_lora
from sheeprlhf.model.folder.load import load_causal_lm, load_tokenizer
from sheeprlhf.rollout.engines import StopStrings, generate_responses
from sheeprlhf.rollout.sampler import Sampled, draw, prompt_groups, sample_responses
from sheeprlhf.structure.model import LORAConfig, ModelConfig, TinyConfig
from sheeprlhf.structure.reward import FunctionRewardConfig
from sheeprlhf.structure.run import GenConfig
from sheeprlhf.task.finish import sample_table
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.lightning import Fabric
from tests.support.models import ARCHITECTURES, EOS, PAD, VOCAB, ModelFolder, byte_tokenizer
from tests.unit.rollout.test_collect_steps import make_setting, prompts

Stop = Callable[[np.ndarray], bool]
LENGTHS = (5, 1, 9, 3, 9)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 250, length).astype(np.int32) for length in LENGTHS]
UNIFORMS = RNG.random((len(LENGTHS), 3, 7))
UNIFORMS[3, 1:] = UNIFORMS[3, 0]  # three equal responses


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Weights are large enough that a token depends on those before it."""
    cfg = ModelConfig(config_name="auto", repo_name=str(folder), **options)
    model = load_causal_lm(cfg, vocabulary=VOCAB, longest=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def sample(model: PreTrainedModel, indices: Any = slice(None), **options: Any) -> list[Sampled]:
    prompts = [PROMPTS[index] for index in np.arange(len(PROMPTS))[indices]]
    settings = dict(prompts=prompts, uniforms=UNIFORMS[indices], temperature=1.0, end_ids=[EOS], token_budget=10**6)
    return sample_responses(model, **settings | options)


def likeliest(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities of the k likeliest tokens, of these the fewest that have top_p of their probability together."""
    order = np.argsort(-weights)[: top_k or None]
    shares = np.cumsum(weights[order] / weights[order].sum())
    kept = order[: int(np.searchsorted(shares, top_p)) + 1] if top_p < 1 else order
    result = np.zeros_like(weights)
    result[kept] = weights[kept] / weights[kept].sum()
    return result


@torch.no_grad()
def assert_by_definition(
    model: Any,
    sampled: list[Sampled],
    *,
    prompts: list[np.ndarray] = PROMPTS,
    temperature: float = 1.0,
    end_ids: Sequence[int] = (EOS,),
    stop: Stop = lambda _: False,
    top_k: int = 0,
    top_p: float = 1.0,
    undefined: Sequence[int] = (),
) -> None:
    """Every token against a plain forward pass of its prompt and response alone, in numpy's float64."""
    model.eval()
    for prompt, uniforms_KN, found in zip(prompts, UNIFORMS, sampled, strict=True):
        for uniforms_N, ids, logprobs, finished in zip(uniforms_KN, *found, strict=True):
            assert ids.dtype == np.int32 and logprobs.dtype == np.float32
            whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
            logits = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].double().numpy()
            logits[:, list(undefined)] = -np.inf
            probabilities = np.stack([likeliest(row, top_k, top_p) for row in np.exp(logits / temperature)])
            expected = [
                np.flatnonzero(row.cumsum() > uniform)[0]
                for row, uniform in zip(probabilities, uniforms_N, strict=False)
            ]
            assert_array_equal(ids, expected)
            assert_allclose(logprobs, np.log(probabilities[np.arange(len(ids)), ids]), rtol=0, atol=1e-5)
            ends = [token in end_ids or stop(ids[:number]) for number, token in enumerate(ids, 1)]
            assert ends == [False] * (len(ids) - 1) + [finished]
            assert finished or len(ids) == len(uniforms_N)


def assert_equal(left: list[Sampled], right: list[Sampled]) -> None:
    for one, other in zip(left, right, strict=True):
        for ids, other_ids in zip(one.responses, other.responses, strict=True):
            assert_array_equal(ids, other_ids)
        for logprobs, other_logprobs in zip(one.logprobs, other.logprobs, strict=True):
            assert_allclose(logprobs, other_logprobs, rtol=0, atol=1e-5)
        assert one.finished == other.finished


def ends_sometimes(ids: np.ndarray) -> bool:
    """After one to nine tokens, as the first one says; there is room for seven."""
    return len(ids) > ids[0] % 9


@pytest.mark.parametrize(
    ("packed", "temperature"),
    [(False, 1.4), (True, 1.4), *(pytest.param(True, heat, marks=pytest.mark.slow) for heat in (0.6, 1.0))],
)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "deepseek_v3"])
def test_it_is_a_loop_without_cache_batch_or_padding(
    architecture: str, packed: bool, temperature: float, model_folder: ModelFolder
) -> None:
    """Dropout is configured where the architecture has any, and the model is in training mode."""
    model = load(model_folder(architecture), disable_dropout=False)
    sampled = sample(model.train(), temperature=temperature, packed=packed)
    assert len({tuple(ids) for found in sampled for ids in found.responses}) == 13  # three are one and the same
    assert_by_definition(model, sampled, temperature=temperature)


def test_only_allowed_tokens_are_sampled(model_folder: ModelFolder) -> None:
    """Temperature, the likeliest tokens and undefined ids reach every draw, also where prompts come one by one."""
    model, limits = load(model_folder()), {"temperature": 1.4, "top_k": 40, "top_p": 0.8}
    undefined = list(range(0, VOCAB, 2))
    options: dict[str, Any] = limits | {"undefined_U": torch.tensor(undefined)}
    assert_by_definition(model, sample(model, max_prompts=1, **options), undefined=undefined, **limits)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_that_end_do_not_disturb_the_others(packed: bool, model_folder: ModelFolder) -> None:
    """They end one by one, one prompt's all at once, by EOS and by `stop`; an EOS inside a prompt ends nothing."""
    model = load(model_folder())
    plain = sample(model, end_ids=[])
    later = [ids for found in plain[2:] for ids in found.responses if not ends_sometimes(ids[:4])]
    eos_id = int(later[0][3])  # where `stop` would go on
    messages: list[int] = []
    prompts = [np.append(prompt, np.int32(eos_id)) for prompt in PROMPTS[:2]] + PROMPTS[2:]
    options: dict[str, Any] = dict(prompts=prompts, end_ids=[eos_id], stop=ends_sometimes)
    sampled = sample(model, progress=messages.append, packed=packed, **options)
    assert_by_definition(model, sampled, **options)
    assert any(ids[-1] == eos_id and not ends_sometimes(ids) for found in sampled for ids in found.responses)
    ended = [finished for found in sampled for finished in found.finished]
    assert any(ended) and not all(ended) and len({len(ids) for found in sampled for ids in found.responses}) > 3
    assert sum(messages) == 15 and len(messages) > 3


def test_eos_is_part_of_the_response_and_ends_it(model_folder: ModelFolder) -> None:
    model = load(model_folder())
    plain = sample(model, end_ids=[])
    assert all(len(ids) == 7 for found in plain for ids in found.responses)
    assert not any(finished for found in plain for finished in found.finished)
    eos_id = int(plain[0].responses[1][6])  # the last token that there is room for
    [found] = sample(model, slice(0, 1), end_ids=[eos_id])
    assert found.responses[1][-1] == eos_id and found.finished[1]
    assert found.finished == tuple(eos_id in ids for ids in plain[0].responses)
    eos_id = int(plain[0].responses[1][0])
    [found] = sample(model, slice(0, 1), end_ids=[eos_id])
    assert found.responses[1].tolist() == [eos_id] and found.finished[1]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_the_batch_its_order_and_its_cut_change_nothing(architecture: str, model_folder: ModelFolder) -> None:
    model = load(model_folder(architecture))
    expected = sample(model, stop=ends_sometimes)
    for token_budget in (1, 4, 9, 20):
        assert_equal(sample(model, stop=ends_sometimes, token_budget=token_budget), expected)
    assert_equal(sample(model, slice(None, None, -1), stop=ends_sometimes), expected[::-1])
    assert_equal(sample(model, slice(2, 3), stop=ends_sometimes), expected[2:3])
    single = sample(model, stop=ends_sometimes, uniforms=UNIFORMS[:, 1:2])
    alone = [Sampled(*(values[1:2] for values in found)) for found in expected]
    assert_equal(single, alone)
    assert sample_responses(model, [], UNIFORMS[:0], temperature=1.0, end_ids=[EOS], token_budget=1) == []


def test_groups_by_hand() -> None:
    """Shortest first; what is computed of padded prompts and what is held of all are bounded."""
    # 2 * 5, 3 * 7 and 2 * 9 are computed
    assert list(prompt_groups([5, 9, 1, 7], 1, 1, 18, shared=False)) == [[2, 0], [3, 1]]
    assert list(prompt_groups([5, 9, 1, 7], 1, 1, 17, shared=False)) == [[2, 0], [3], [1]]
    assert list(prompt_groups([5, 9, 1, 7], 1, 1, 21, shared=False)) == [[2, 0, 3], [1]]
    assert list(prompt_groups([5, 9, 1, 7], 1, 1, 5, shared=True)) == [[2, 0, 3, 1]]  # 4 * (9 + 1) = 8 * 5 are held
    assert list(prompt_groups([1, 2], 3, 10, 8, shared=True)) == [[0, 1]]  # 2 * (2 + 3 * 10) = 8 * 8 are held
    assert list(prompt_groups([1, 2], 3, 11, 8, shared=True)) == [[0], [1]]
    assert list(prompt_groups([1, 2], 3, 10, 9, shared=False)) == [[0, 1]]  # 2 * 3 * (2 + 10) = 8 * 9
    assert list(prompt_groups([1, 2], 3, 10, 8, shared=False)) == [[0], [1]]
    assert list(prompt_groups([5, 9], 2, 10, 1, shared=True)) == [[0], [1]]
    assert list(prompt_groups([], 2, 10, 1, shared=True)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_flags_settings_and_generators_are_unchanged(fails: bool, model_folder: ModelFolder) -> None:
    model = load(model_folder("gpt2"))
    expected = sample(model)
    own = GenerationConfig(do_sample=True, temperature=0.1, top_k=2, max_length=3, eos_token_id=3, pad_token_id=7)
    model.generation_config = own
    model.train()
    model.transformer.h[1].eval()  # a mixed state
    flags = [module.training for module in model.modules()]
    settings, config, state = own.to_dict(), model.config.to_dict(), torch.get_rng_state()
    during: list[bool] = []
    model.transformer.register_forward_hook(lambda *_: during.extend(module.training for module in model.modules()))
    if fails:
        with pytest.raises(ZeroDivisionError):
            sample(model, stop=lambda ids: 1 / 0 > 1)
    else:
        assert_equal(sample(model), expected)
    assert during and not any(during)
    assert [module.training for module in model.modules()] == flags
    assert model.generation_config is own and own.to_dict() == settings and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_are_part_of_the_model(architecture: str, model_folder: ModelFolder) -> None:
    plain = load(model_folder(architecture))
    without = sample(plain)
    torch.manual_seed(0)
    adapted = add_lora(plain, LORAConfig(rank=4, dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    sampled = sample(adapted.train().get_base_model())
    assert_by_definition(adapted, sampled)
    assert any(
        not np.array_equal(one.responses[0], two.responses[0]) for one, two in zip(sampled, without, strict=True)
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision(architecture: str, dtype: str, model_folder: ModelFolder) -> None:
    """By bf16-mixed and bf16-true, log-probabilities are the training forward's but for rounding."""
    model = load(model_folder(architecture), dtype=dtype)
    precision: Any = "bf16-mixed" if dtype == "float32" else "bf16-true"
    with Fabric(accelerator="cpu", devices=1, precision=precision).autocast():
        sampled = sample(model)
        model.eval()
        for prompt, found in zip(PROMPTS, sampled, strict=True):
            for ids, logprobs in zip(found.responses, found.logprobs, strict=True):
                assert logprobs.dtype == np.float32 and (logprobs <= 0).all()
                if architecture != "falcon":
                    with torch.no_grad():
                        expected = Policy(model)(collate_packed([Example(0, prompt, (ids,))])).target_N
                    assert_allclose(logprobs, expected.numpy(), rtol=0, atol=0.1)


def test_draw_takes_each_token_as_often_as_it_is_likely() -> None:
    """On a grid of numbers every count is right to one; with random ones Pearson's statistic is in its middle 99%."""
    probabilities_V = np.array([0.1, 0.0, 0.05, 0.4, 0.25, 0.0, 0.2])
    logits_V = torch.from_numpy(1.7 * np.log(np.maximum(probabilities_V, 1e-300))).float()
    logits_V[[1, 5]] = -torch.inf
    num = 20_000
    for uniforms in (np.arange(num) / num + 0.5 / num, np.random.default_rng(3).random(num)):
        ids, logprobs = draw(logits_V.expand(num, -1), torch.from_numpy(uniforms), 1.7)
        counts = np.bincount(ids.numpy(), minlength=7)
        assert counts[1] == counts[5] == 0
        likely = probabilities_V > 0
        expected = num * probabilities_V[likely]
        statistic = ((counts[likely] - expected) ** 2 / expected).sum()
        assert statistic < 1e-2 or 0.2 < statistic < 14.9  # of 4 degrees of freedom
        assert_allclose(logprobs.exp().numpy(), probabilities_V[ids.numpy()], rtol=1e-5)
    assert statistic > 0.2


def test_draw_at_the_ends() -> None:
    """Never a token of probability 0, which here are the first and the last ones; ids in order of the vocabulary."""
    logits_V = torch.tensor([-torch.inf, 0.0, -200.0, 1.0, -torch.inf, -torch.inf])
    uniforms = torch.tensor([0.0, 0.26, 0.27, 1 - 2**-53], dtype=torch.float64)  # 1 / (1 + e) = 0.2689...
    ids, _ = draw(logits_V.expand(4, -1), uniforms, 1.0)
    assert ids.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_draw_of_logits_that_are_not_finite_gives_a_token_and_says_so(top_k: int, top_p: float) -> None:
    """On a GPU an id past the vocabulary would end the process; the log-probability has it refused by who reads it."""
    logits_BV = torch.zeros(3, 5)
    logits_BV[1, 2], logits_BV[2, 0] = torch.nan, torch.inf
    ids, logprobs = draw(logits_BV, torch.tensor([0.5, 0.5, 0.9], dtype=torch.float64), 1.0, top_k, top_p)
    assert ((ids >= 0) & (ids < 5)).all()
    assert logprobs.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.7), (4, 0.8), (50, 0.999)])
def test_only_the_likeliest_are_drawn(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(top_k)
    for _ in range(20):
        logits = rng.normal(0, 2, 9)
        kept = likeliest(np.exp(logits / 0.8), top_k, top_p)
        uniforms = rng.random(40)
        ids, logprobs = draw(torch.tensor(logits).expand(40, -1), torch.from_numpy(uniforms), 0.8, top_k, top_p)
        expected = np.searchsorted(np.cumsum(kept), uniforms * kept.sum(), side="right")
        assert_array_equal(ids.numpy(), expected)
        assert_allclose(logprobs.numpy(), np.log(kept[expected]), atol=1e-5)


TEXT = 'Return the list. Für ☃ "END"\n\n    def end(self):\n"""Zwei €. END of all..\n\n\n'
STRINGS = ["\n\n", ".", " END", "END", "☃", "€. E", '"""', "the list", "r the", " ", "no such thing"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As llama's first: pieces begin with a space that the decoder drops at the start; bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnoprstuvwxyzERND.():", "▁END", "▁the", "▁list", "▁of", "END"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i > 2)) for i, piece in enumerate(pieces)], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "embedded": lambda: load_tokenizer(TinyConfig()),
    "sentencepiece": sentencepiece,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_ends_where_the_whole_text_first_has_a_string(name: str) -> None:
    """Real texts, and random tokens: characters in parts, special tokens in between, pieces that begin with a space."""
    tokenizer = TOKENIZERS[name]()
    rng = random.Random(0)
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    texts = [tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    for _ in range(8):
        texts.append([rng.randrange(len(tokenizer)) for _ in range(40)])
        mixed = list(texts[0])
        for _ in range(12):
            mixed.insert(rng.randrange(len(mixed)), rng.choice(special))
        texts.append(mixed)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("E", "N", "D.")]
    texts.append([i for part in parts for i in (*part, *special[:1] * 40)])
    ended = 0
    for ids in (np.array(text, dtype=np.int32) for text in texts):
        numbers = range(1, len(ids) + 1)
        whole = [tokenizer.decode(ids[:number].tolist(), skip_special_tokens=True) for number in numbers]
        for string in STRINGS:
            stop = StopStrings([string], tokenizer)
            expected = next((number for number in numbers if string in whole[number - 1]), 0)
            assert next((number for number in numbers if stop(ids[:number])), 0) == expected, string
            ended += expected > 0
    assert ended > 20


def test_only_the_end_is_decoded_until_it_has_a_string(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("a" * 500 + "END", add_special_tokens=False)["input_ids"], dtype=np.int32)
    stop = StopStrings(["END"], tokenizer)
    lengths: list[int] = []
    plain = StopStrings._decode
    monkeypatch.setattr(StopStrings, "_decode", lambda self, ids: lengths.append(len(ids)) or plain(self, ids))
    assert [stop(ids[:number]) for number in (500, 501, 502, 503)] == [False, False, False, True]
    assert max(lengths[:3]) < 20 and lengths[-1] == 503


LEFT = [([], "a END b"), (["END"], "a "), (["b", " E"], "a"), (["c"], "a END b")]


@pytest.mark.parametrize(("strings", "left"), LEFT)
def test_the_text_before_the_first_string_is_left(strings: list[str], left: str) -> None:
    tokenizer = byte_tokenizer()
    ids = np.array([*tokenizer("a END b", add_special_tokens=False)["input_ids"], EOS], dtype=np.int32)
    assert StopStrings(strings, tokenizer).text(ids) == left


def test_a_special_token_may_be_one() -> None:
    tokenizer = byte_tokenizer()
    stop = StopStrings(["<pad>"], tokenizer)
    assert [stop(np.array(ids)) for ids in ([65], [65, PAD], [65, EOS])] == [False, True, False]
    assert stop.text(np.array([65, PAD])) == tokenizer.decode([65])
    with pytest.raises(ConfigError, match=r"<pad>.*stop_strings=\["):
        StopStrings(["<pad>\n"], tokenizer)
    assert not StopStrings([], tokenizer) and not StopStrings([], tokenizer)(np.array([PAD]))


@pytest.mark.parametrize("beams", [1, 2])
def test_shown_texts_end_there_too(beams: int, model_folder: ModelFolder) -> None:
    """Each is what is written without stop strings, up to the first of them; nothing is computed beyond the last."""
    cfg = ModelConfig(config_name="auto", repo_name=str(model_folder()))
    model, tokenizer = load_causal_lm(cfg, vocabulary=VOCAB, longest=64), load_tokenizer(cfg)
    prompts = [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in (b"a", b"some longer words", b"Hi")]
    plain = generate_responses(model, tokenizer, prompts, GenConfig(max_new_tokens=12, num_beams=beams))
    strings = [text[len(text) // 2] for text in plain]
    steps: list[int] = []
    model.register_forward_hook(lambda *_: steps.append(1))
    cfg_of_stop = GenConfig(max_new_tokens=12, num_beams=beams, stop_strings=strings)
    found = generate_responses(model, tokenizer, prompts, cfg_of_stop)
    if beams == 1:
        assert len(steps) < 12
        assert found == [min((text.split(string)[0] for string in strings), key=len) for text in plain]
    assert not any(string in text for string in strings for text in found)


def test_tokens_stay_and_the_text_is_cut(model_folder: ModelFolder) -> None:
    """The same responses as without, up to the token that completes a string; and the penalty on cut ones."""
    reward = FunctionRewardConfig(path="length", target_length=1, length_unit="characters", missing_eos_penalty=7.0)
    plain_setting = make_setting(model_folder(), reward)
    plain = plain_setting.collect(prompts(), 0)
    decode = plain_setting.collect.tokenizer.decode
    texts_of = [decode(ids.tolist()) for row in plain.rows for ids in row.responses]
    string = next(c for c in "".join(texts_of) if 0 < sum(c in text[:-1] for text in texts_of) < len(texts_of) - 1)
    setting = make_setting(model_folder(), reward, GenConfig(max_new_tokens=6, temperature=0.7, stop_strings=[string]))
    stopped = setting.collect(prompts(), 0)
    assert min(map(len, (ids for row in stopped.rows for ids in row.responses))) < 6 and not stopped.finished.all()
    texts, scores = iter(stopped.texts.responses), iter(stopped.scores.reshape(-1))
    for row, other, finished_K in zip(stopped.rows, plain.rows, stopped.finished, strict=True):
        for ids, whole, finished in zip(row.responses, other.responses, finished_K, strict=True):
            ends = [n for n in range(1, len(whole) + 1) if string in decode(whole[:n].tolist()) or whole[n - 1] == EOS]
            assert ids.tolist() == whole[: ends[0] if ends else None].tolist()
            text = decode(ids.tolist(), skip_special_tokens=True).split(string)[0]
            assert next(texts) == text
            assert finished == bool(ends)
            score = min(len(text), 1) / max(len(text), 1)
            assert next(scores) == pytest.approx(score - (0.0 if ends else 7.0))
    assert stopped.tokens["logprobs"][0].shape == (sum(map(len, stopped.rows[0].responses)),)
    np.testing.assert_allclose(stopped.tokens["reference"][0], stopped.tokens["logprobs"][0], atol=1e-5)
    shown = sample_table(setting.collect(prompts(), 0, group=1, validates=True), 3)
    assert string not in "".join(part.split("\n", 1)[1].split("[reference]")[0] for part in shown.split("[model]")[1:])
