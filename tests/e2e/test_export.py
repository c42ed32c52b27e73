"""An exported folder computes what the run computed, for plain transformers, or it is not there."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import sheeprlhf.task.export as export
from sheeprlhf.cli import run
from sheeprlhf.config.model_lookup import REWARD_MODEL, find_trained
from sheeprlhf.data.prompt_encoder import Turn
from sheeprlhf.task.text_generator import load_reward_scorer
from sheeprlhf.utils.errors import ConfigError
from tests.support.hub import UploadHub, serve_uploads
from tests.support.models import BOS, EOS, PAD, VOCAB
from tests.support.runs import digests, rejected
from tests.support.talking import TEMPLATE, make_runs, write_result

IDS = torch.tensor([[257, *b"5 the quick brown fox?", *b" lazy dog.", 258]])
TOKEN = "hf_" + "aB3dE6gH9j" * 4
VLLM = {"LlamaForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel", "PhiForCausalLM", "Qwen3ForCausalLM"}  # a few of its


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_runs(tmp_path_factory.mktemp("export"))


def exported(run_dir: Path, target: Path, *flags: str) -> Path:
    run(["export", str(run_dir), "--to", str(target), *flags])
    return target


@pytest.fixture(scope="module")
def once(runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function (name of a run) -> its export without flags, made once, which no test changes."""
    folder = tmp_path_factory.mktemp("exported")
    return functools.cache(lambda name: exported(runs[name], folder / name))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def of_folder(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    return rejected(["export", *map(str, words)], capsys)


def test_merged_adapters_compute_what_peft_computes(runs, tmp_path, capsys):
    folder = exported(runs["dpo"], tmp_path / "new" / "out")
    whole = AutoModelForCausalLM.from_pretrained(runs["sft"] / "final", dtype=torch.float32)
    without = logits(whole)
    expected = logits(PeftModel.from_pretrained(whole, runs["dpo"] / "final"))
    assert (expected - without).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(of_folder(folder), expected, rtol=0, atol=1e-5)
    assert not list(folder.glob("adapter*"))
    assert "float32" in capsys.readouterr().out


def test_a_run_without_adapters_keeps_its_bits(runs, tmp_path):
    folder = exported(runs["sft"], tmp_path / "out")
    ours, final = (load_file(place / "model.safetensors") for place in (folder, runs["sft"] / "final"))
    assert ours.keys() == final.keys()
    assert all(torch.equal(ours[key], final[key]) for key in ours)


@pytest.mark.slow
def test_a_checkpoint_can_be_taken_instead(runs, once, tmp_path):
    folder = exported(runs["dpo"], tmp_path / "out", "--weights", "step-1")
    assert (of_folder(folder) - of_folder(once("dpo"))).abs().max() > 1e-3
    last = exported(runs["dpo"], tmp_path / "last", "--weights", "last")
    assert torch.equal(of_folder(last), of_folder(once("dpo")))


@pytest.mark.slow
def test_another_number_format_is_the_rounded_weights(runs, once, tmp_path):
    whole = load_file(once("dpo") / "model.safetensors")
    half = load_file(exported(runs["dpo"], tmp_path / "half", "--dtype", "bfloat16") / "model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(half[key], whole[key].bfloat16()) for key in whole)
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_reward_model_scores_as_it_did(runs, once):
    folder = once("rm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    scorer = load_reward_scorer(find_trained(str(runs["rm"]), wanted=REWARD_MODEL), print)
    expected = scorer.score("text", [Turn("user", "5 the quick brown fox?")], " lazy dog.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        raw = model(**tokenizer("5 the quick brown fox? lazy dog.</s>", return_tensors="pt")).logits.item()
    assert raw - model.config.reward_offset == pytest.approx(expected, abs=1e-5)
    assert model.config.reward_offset != 0
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD
    assert f"`{model.config.reward_offset:.6g}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["dpo", "rm"])
def test_the_folder_has_what_vllm_asks_for(name, runs, once):
    folder = once(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == (["LlamaForSequenceClassification"] if name == "rm" else ["LlamaForCausalLM"])
    assert name == "rm" or set(config["architectures"]) <= VLLM
    assert config["dtype"] == "float32"
    assert config["use_cache"] is True
    assert "auto_map" not in config and "quantization_config" not in config
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors", ".md"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(runs["model"])
    text = "a new text</s> with a token"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    assert len(tokenizer) <= config["vocab_size"] == VOCAB
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & saved.keys()
    if name == "dpo":
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (BOS, EOS, PAD)


def test_a_wrong_merge_is_refused_with_figures(runs, tmp_path, monkeypatch, capsys):
    merge = LoraModel.merge_and_unload

    def wrong(model):
        merged = merge(model)
        merged.model.norm.weight.data[3] += 0.01
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    before = digests(runs["dpo"])
    printed = refused(capsys, runs["dpo"], "--to", tmp_path / "out")
    assert "merged" in printed
    assert "outputs differ by 0.0" in printed
    assert list(tmp_path.iterdir()) == []
    assert digests(runs["dpo"]) == before


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_folder_that_was_written_wrong_is_not_left(part, runs, tmp_path, monkeypatch, capsys):
    save = export._save

    def wrong(model, tokenizer, folder, **options):
        save(model, tokenizer, folder, **options)
        if part == "weights":
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"][3] += 0.01
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        else:
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"a"', '"aa"'))

    monkeypatch.setattr(export, "_save", wrong)
    printed = refused(capsys, runs["sft"], "--to", tmp_path / "out")
    assert {"weights": "computes", "tokenizer": "tokenizer"}[part] in printed
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_user_is_overwritten(runs, tmp_path, capsys):
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    (tmp_path / "link").symlink_to(empty)
    for target in (full, file, tmp_path / "link"):
        assert f"--to {target}" in refused(capsys, runs["sft"], "--to", target)
    assert "is not a folder" in refused(capsys, runs["sft"], "--to", file / "below")
    exported(runs["sft"], empty)
    assert (full / "mine.txt").read_text() == file.read_text() == "mine"
    assert (empty / "model.safetensors").is_file()


def test_a_killed_export_is_swept_and_never_taken_for_a_model(runs, tmp_path, monkeypatch):
    target = tmp_path / "out"
    process = os.fork()
    if not process:
        # after everything is written and checked, before the folder gets its name
        monkeypatch.setattr(export, "check_target", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        exported(runs["dpo"], target)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left != target and (left / "new" / "README.md").is_file()
    for folder in (left, left / "new"):
        with pytest.raises(ConfigError, match="killed"):
            find_trained(str(folder))
    exported(runs["dpo"], target)
    assert list(tmp_path.iterdir()) == [target]


def test_all_mistakes_are_reported_at_once(tmp_path, capsys):
    printed = refused(capsys, "--dtype", "bf16", "--too", "x")
    assert "bfloat16" in printed
    assert "--to" in printed
    assert "--private" in refused(capsys, "tiny", "--to", tmp_path / "x", "--private")
    two = refused(capsys, "tiny", "--to", tmp_path / "x", "--push", "me/one", "--push-to-hub", "me/two")
    assert "--push-to-hub" in two
    printed = refused(capsys, "--push", "a b")
    assert printed.count("\n  - ") == 3 and "--to" in printed and "owner/name" in printed
    printed = refused(capsys, "tiny", "--to", tmp_path / "x", "--push", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
    assert "credential" in printed and "hf_abc" not in printed


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A hub on the loopback interface, which the exports of a test reach with its token."""
    with serve_uploads(TOKEN) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield running


@pytest.mark.parametrize(
    ("flags", "visibility"), [(["--push"], None), (["--private", "--push"], "private"), (["--push-to-hub"], "private")]
)
def test_an_export_is_uploaded_with_its_card(flags, visibility, runs, tmp_path, hub, capfd, caplog):
    folder = exported(runs["sft"], tmp_path / "out", *flags, "me/fox")
    printed = capfd.readouterr()
    assert hub.repositories == {"me/fox": visibility}
    uploaded = {name.removeprefix("me/fox/"): content for name, content in hub.files.items()}
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: uploaded[name] for name in written} == written
    assert uploaded.keys() - written.keys() <= {".gitattributes"}
    assert b'from_pretrained("me/fox")' in uploaded["README.md"] and b"<folder>" not in uploaded["README.md"]
    assert f"{hub.endpoint}/me/fox" in printed.out
    everything = [printed.out, printed.err, caplog.text, *(content.decode("latin-1") for content in written.values())]
    assert not any(TOKEN in text for text in everything)


def test_a_public_repository_is_not_taken_for_a_private_one(runs, tmp_path, hub, capsys):
    hub.repositories["me/fox"] = "public"
    assert "--private" in refused(capsys, runs["sft"], "--to", tmp_path / "out", "--push", "me/fox", "--private")
    assert not (tmp_path / "out").exists()
    assert hub.files == {}


@pytest.mark.parametrize("reason", ["offline", "no token", "no answer", "wrong token"])
def test_nothing_is_exported_if_it_could_not_be_uploaded(reason, runs, tmp_path, hub, monkeypatch, capsys):
    if reason == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif reason == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    elif reason == "no answer":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    start = time.perf_counter()
    printed = refused(capsys, runs["sft"], "--to", tmp_path / "out", "--push", "me/fox")
    assert time.perf_counter() - start < 60  # this machine may be busy with other tests
    word = {
        "offline": "HF_HUB_OFFLINE",
        "no token": "HF_TOKEN",
        "no answer": "cannot be reached",
        "wrong token": "does not accept",
    }
    assert word[reason] in printed
    assert TOKEN not in printed and TOKEN[::-1] not in printed
    assert list(tmp_path.iterdir()) == []
    assert not any(line.startswith(("POST", "PUT")) for line in hub.asked)


def test_the_folder_stays_if_the_upload_fails(runs, tmp_path, hub, monkeypatch, capsys):
    def fails(*_: object, **__: object) -> None:
        raise OSError(f"no route to the hub for {TOKEN}")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    printed = refused(capsys, runs["sft"], "--to", tmp_path / "out", "--push", "me/fox")
    assert f"hf upload me/fox {tmp_path / 'out'}" in printed
    assert TOKEN not in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_card_tells_how_it_was_made(runs, tmp_path):
    evil = "<script>alert(1)</script>|[x](javascript:y)`\x1b[31m"
    about = {"task": "perplexity", "data": "local", "split": "test", "weights": "final"}
    write_result(runs["dpo"], "perplexity-test", perplexity=12.25, rows=24, time="now", **about)
    write_result(runs["dpo"], "evil", **{evil: 1.5}, **about | {"task": evil})
    try:
        card = (exported(runs["dpo"], tmp_path / "out") / "README.md").read_text()
    finally:
        for path in (runs["dpo"] / "eval").iterdir():
            path.unlink()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| perplexity | local | test | final | perplexity | 12.25 |" in card
    assert "train task=sft" in card and "train task=dpo" in card  # both stages
    assert card.index("train task=sft") < card.index("train task=dpo")
    assert "| model.lora_cfg | targets all-linear, rank 4" in card
    assert "logits differ by" in card
    assert f"transformers {transformers.__version__}" in card
    for wrong in ("<script>", "[x](", "\x1b"):
        assert wrong not in card
    for heading in ("Data", "Recipe", "Results", "Checks of this folder", "Limits", "Licence", "Versions"):
        assert f"\n## {heading}\n" in card
