"""A program that has imported what the tests need, and nothing of ours, and forks a pytest for each line of its input.

A line is a JSON object of `become_pytest`'s arguments; the answer is a line with the exit code. It is started by its
path, so that no checkout's `tests` or `sheeprlhf` is imported before a copy's are.
"""

import importlib
import json
import os
import signal
import sys

PRELOADED = (
    "lightning.fabric",
    "datasets",
    "peft",
    "hydra",
    "pytest",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
)
LONGEST = 600  # seconds; then the forked process is ended


def become_pytest(tree: str, words: list[str], environment: dict[str, str], log: str) -> None:
    """In the forked process: never returns."""
    code = 70
    try:
        signal.alarm(LONGEST)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(tree)
        sys.path.insert(0, tree)
        sys.argv[:] = ["pytest", *words]
        sys.dont_write_bytecode = True
        code = importlib.import_module("pytest").main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork, wait, answer."""
    sys.path.pop(0)  # this file's folder
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            become_pytest(**json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
