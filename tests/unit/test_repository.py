"""What the package never does: unpickle, evaluate text, or trust a stranger's code; and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sheeprlhf"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "joblib", "shelve", "marshal", "dill", "cloudpickle"}
CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "torch.save",
    "numpy.load",
    "np.load",
    "evaluate.load",
    "pd.read_pickle",
    "os.system",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
}
PLAIN_LOADERS = {"_PlainLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}


def offences(tree: ast.AST) -> Iterator[str]:
    """What a file does that it may not, with its line."""
    for node in ast.walk(tree):
        for found in (*_imports(node), *_calls(node), *_trust(node)):
            yield f"line {getattr(node, 'lineno', '?')}: {found}"


def _imports(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    yield from (name for name in names if name.partition(".")[0] in MODULES or name in CALLS)


def _calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    plain_load = name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(False))) == "True"
    if name in CALLS and not plain_load:
        yield name
    if name == "yaml.load" and ("Loader" not in keywords or ast.unparse(keywords["Loader"]) not in PLAIN_LOADERS):
        yield "yaml.load without a plain loader"
    for argument in ("shell", "allow_pickle"):
        if argument in keywords and ast.unparse(keywords[argument]) != "False":
            yield argument


def _trust(node: ast.AST) -> Iterator[str]:
    """`trust_remote_code` given as a literal True: a keyword, an assignment, a dict's entry or a default."""
    pairs: list[tuple[str, ast.expr | None]] = []
    if isinstance(node, ast.keyword):
        pairs = [(node.arg or "", node.value)]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(ast.unparse(target), node.value) for target in targets]
    elif isinstance(node, ast.Dict):
        pairs = [(ast.unparse(key) if key else "", value) for key, value in zip(node.keys, node.values, strict=True)]
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        pairs = [(arg.arg, value) for arg, value in zip(positional[::-1], node.defaults[::-1], strict=False)]
        pairs += [(arg.arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    for name, value in pairs:
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "option" and value.args:
            value = value.args[0]
        if "trust_remote_code" in name and isinstance(value, ast.Constant) and value.value is True:
            yield "trust_remote_code=True"


def test_no_file_runs_untrusted_code() -> None:
    assert [(path, found) for path in FILES for found in offences(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import joblib.externals",
        "from shelve import open",
        "from torch import load",
        "def f():\n    import marshal",
        "torch.load(path)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval('1')",
        "exec(code)",
        "evaluate.load('rouge')",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "cfg.trust_remote_code = True",
        "saved['trust_remote_code'] = True",
        "class C:\n    trust_remote_code: bool = option(True, 'text')",
        "def f(*, trust_remote_code=True): ...",
        "def f(a, trust_remote_code=True): ...",
    ],
)
def test_the_check_sees(code: str) -> None:
    assert list(offences(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "yaml.load(text, Loader=_PlainLoader)",
        "yaml.safe_load(text)",
        "model.eval()",
        "evaluate(fabric)",
        "safetensors.torch.load_file(path)",
        "f(trust_remote_code=cfg.trust_remote_code)",
        "class C:\n    trust_remote_code: bool = option(False, 'text')",
    ],
)
def test_the_check_lets_pass(code: str) -> None:
    assert not list(offences(ast.parse(code)))
