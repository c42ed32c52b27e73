"""A stranger's `config.yaml` is read as plain data of bounded size."""

import time

import pytest

from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.utils.errors import ConfigError

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "object": "model: !!python/object/apply:os.mkdir [sentinel]\n",
    "anchors": BOMB,
    "deep": "model: " + "[" * 100_000,
    "large": "model: {repo_name: " + "x" * 1_100_000 + "}\n",
    "list": "- 1\n",
    "torn": "model: {repo_name\n",
    "binary": "model: \x00\x01",
    "no_model": "data: {config_name: docstrings}\n",
    "unknown_key": "model: {config_name: opt, _target_: os.mkdir}\n",
    "interpolation": "model: {config_name: opt, repo_name: '${oc.env:HOME}'}\n",
    "wrong_type": "model: {config_name: opt, lr: fast}\n",
    "missing": "model: {config_name: auto}\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_quickly(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(BAD[kind])
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        saved_group(str(tmp_path), "model")
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 500
    assert kind != "anchors" or "alias" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
