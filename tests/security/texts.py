"""Chat templates, adapter configurations, datasets and configurations of strangers, and how each is loaded."""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sheeprlhf.config.run_lookup import saved_group
from sheeprlhf.data.layout import RowLayout
from sheeprlhf.data.read import read_batches
from sheeprlhf.data.source import locate
from sheeprlhf.model.adapter import read_adapter_config
from sheeprlhf.security.model_folder import check_templates
from sheeprlhf.structure.data import DataConfig, LocalDataConfig
from tests.security.config_files import TARGETS
from tests.security.folders import safetensors
from tests.security.guard import pickled

Attempt = Callable[[], object]
TEMPLATES = {  # SENTINEL is the path of a file that must not appear
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "a long text": "{{ 'A' * 10**7 }}",
    "a text without end": "{{ 'A' * 10**12 }}",
    "doubling": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "padding": "{{ '%0999999999d' % 1 }}",
    "indent": "{{ messages|tojson(indent=10**9) }}",
    "much output": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaa{% endfor %}{% endfor %}",
    "calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('SENTINEL') }}",
    "of a list": "{{ messages.__init__.__globals__ }}",
    "of a macro": "{% macro a() %}{% endmacro %}{{ a.__call__.__func__.__globals__ }}",
    "of a generator": "{{ (messages|map('upper')).gi_frame.f_builtins['open']('SENTINEL', 'w') }}",
    "of a format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "large": "{#" + "a" * 70_000 + "#}",
    "no text": 7,
    "named as a path": {"../../x": "a"},
    "named by a space": {"a b": "a"},
}
_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "auto_mapping": {"auto_mapping": {"base_model_class": "X", "parent_library": "payload"}},
    "megatron_core": {"megatron_config": {"a": 1}, "megatron_core": "payload"},
    "megatron_core alone": {"megatron_core": "payload"},
    "another kind": {"peft_type": "PROMPT_TUNING"},
    "unknown kind": {"peft_type": "../x"},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "eva": {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    "corda": {"corda_config": {"cache_file": "/etc/passwd"}},
    "copies of layers": {"layer_replication": [[0, 10**9]]},
    "arrow": {"arrow_config": {"top_k": 1}},
    "a parameter that is a pattern": {"target_parameters": ["(a+)+$"]},
    "experts that are a pattern": {"alpha_pattern": {r".*\.(a+)+$": 4}},
    "tokens": {"trainable_token_indices": [-1]},
    "a pattern without end": {"target_modules": "(a+)+$"},
    "a name that is a pattern": {"target_modules": ["(a|a)*$"]},
    "a pattern of ranks": {"rank_pattern": {"(a+)+$": 4}},
    "rank of a billion": {"r": 10**9},
    "rank of text": {"r": "2"},
    "rank zero": {"r": 0},
    "dropout of 7": {"lora_dropout": 7},
    "unknown key": {"run_me": "os.system"},
    "no targets": {"target_modules": None},
    "task type of others": {"task_type": "payload"},
}


def templates(place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """Templates that never end, grow, or reach for Python; names that are paths."""
    for name, text in TEMPLATES.items():
        text = text.replace("SENTINEL", str(sentinels / "template")) if isinstance(text, str) else text
        yield name, lambda text=text: check_templates(SimpleNamespace(chat_template=text), "model")


def adapters(place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """Adapter configurations that ask for more than adapters."""
    module = place / "payload.py"
    module.write_text(f"open({str(sentinels / 'module')!r}, 'w').close()\n")
    for number, (name, entries) in enumerate(ADAPTERS.items()):
        folder = place / f"adapter-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(_LORA | entries))
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        safetensors(folder / "adapter_model.safetensors", {"w": entry}, b"\0" * 8)
        yield name, lambda folder=folder: read_adapter_config(folder)


def saved_configs(place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """A run's config.yaml that names something to call in its model, data or task."""
    for number, target in enumerate(TARGETS):
        folder = place / f"run-{number}"
        folder.mkdir()
        path = sentinels / target
        call = f"_target_: {target}, _args_: ['touch {path}'], path: {path}, file: {path}, mode: w, _partial_: false"
        group = ("model", "data", "task")[number % 3]
        name = {"model": "opt", "data": "docstrings", "task": "sft"}[group]
        (folder / "config.yaml").write_text(f"{group}: {{config_name: {name}, {call}}}\n")
        yield target, lambda folder=folder, group=group: saved_group(str(folder), group)


def datasets(place: Path, sentinels: Path) -> Iterator[tuple[str, Attempt]]:
    """Datasets that are code, archives, bombs or links: as a file of the user's, and as a folder."""
    row = b'{"prompt": "a", "response": "b"}\n'
    payload = pickled(sentinels / "rows")
    (place / "secret").write_bytes(row)
    with zipfile.ZipFile(place / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../out.jsonl", bytes(10**7))
    code = f"open({str(sentinels / 'script')!r}, 'w').close()\n".encode()
    zipped, gzipped = (place / "bomb.zip").read_bytes(), gzip.compress(bytes(10**7))
    constant = pa.table({"prompt": pa.array(["a"]).dictionary_encode().take(pa.array(np.zeros(2_000_000, np.int32)))})
    pq.write_table(constant.append_column("response", constant["prompt"]), place / "rows.parquet")
    large = pa.table({"prompt": ["a" * 70_000_000], "response": ["b"]})
    pq.write_table(large, place / "text.parquet", compression="zstd", use_dictionary=False)
    files = {
        "rows.py": code,
        "rows.pkl": payload,
        "rows.zip": zipped,
        "rows.jsonl.gz": gzipped,
        "rows.tar": b"x",
        "rows.arrow": b"x",
        "rows.yaml": b"!!python/object/apply:os.mkdir [x]",
        "pickle.jsonl": payload,
        "pickle.csv": payload,
        "pickle.json": payload,
        "pickle.parquet": payload,
        "zip.parquet": zipped,
        "zip.jsonl": zipped,
        "gzip.jsonl": gzipped,
        "gzip.csv": gzipped,
        "nul.jsonl": bytes(17 * 2**20),
        "deep.jsonl": b'{"prompt": ' + b"[" * 200_000,
        "number.jsonl": b'{"prompt": ' + b"9" * 10_000 + b"}\n",
        "rows.parquet": (place / "rows.parquet").read_bytes(),
        "text.parquet": (place / "text.parquet").read_bytes(),
    }
    for name, content in files.items():
        file = place / "files" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        yield f"the file {name}", lambda file=file: _read(LocalDataConfig(config_name="local", train_file=str(file)))
        folder = place / f"folder-{name}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        yield f"a folder of {name}", lambda folder=folder: _read(DataConfig(config_name="x", dataset_name=str(folder)))
    folder = place / "links"
    folder.mkdir()
    (folder / "train.jsonl").symlink_to("../secret")
    yield "a link out of the folder", lambda: _read(DataConfig(config_name="x", dataset_name=str(folder)))


def _read(cfg: DataConfig) -> None:
    for files in locate(cfg).values():
        for _ in read_batches(files, None, layout=RowLayout(cfg, "sft")):
            pass
