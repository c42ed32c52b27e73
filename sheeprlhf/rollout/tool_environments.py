"""Built-in environments, which need no network: a calculator, and Python programs with tests."""

import ast
import ctypes
import json
import operator
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any, ClassVar

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_MAX_EXPRESSION = 200  # characters
_MAX_DIGITS = 50  # of a number
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CODE = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
_PROGRAM_SECONDS = 4
_PROGRAM_MEMORY = 512 << 20
_PROGRAM_FILE = 1 << 20  # bytes of a file that it writes


def _schema(name: str, description: str, parameter: str, meaning: str) -> dict[str, Any]:
    """Return the JSON schema of a function with one text as its parameter."""
    properties = {parameter: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def evaluate(expression: str) -> Fraction:
    """Return the exact value of an expression with numbers, + - * / // % and parentheses.

    Raises:
        ValueError: it has anything else, or is too long or too large.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > _MAX_EXPRESSION:
        raise ValueError("the expression is too long")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("the expression cannot be read") from None

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            result = Fraction(str(node.value))
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            result = Fraction(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            result = Fraction(_OPERATORS[type(node.op)](value(node.operand)))
        else:
            raise ValueError("only numbers, + - * / // % and parentheses are known")
        if max(abs(result.numerator), result.denominator) >= 10**_MAX_DIGITS:
            raise ValueError("the result is too large")
        return result

    return value(tree.body)


def written_number(value: Fraction) -> str:
    """Write a number as a person does: an integer without a point, else up to six decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text; None if there is none."""
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


class Calculator:
    """Word problems: the tool `calculator` evaluates an expression; 1 if the last number is the column `answer`."""

    tools: ClassVar = [
        _schema("calculator", "Evaluate an arithmetic expression.", "expression", "For example (3 + 4) * 2.")
    ]

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin with a row; its column `answer` is a number or a text whose last number is the answer."""
        answer = last_number(str(row["answer"]))
        if answer is None:
            raise ValueError(f"column 'answer' has no number: {row['answer']!r}")
        self._answer = answer

    def step(self, call: Any) -> tuple[str, float, bool]:
        """Return the value of the expression, or an error that the model can correct."""
        if call.name != "calculator":
            return f"error: there is no tool {call.name}", 0.0, False
        try:
            return written_number(evaluate(str(call.arguments.get("expression", "")))), 0.0, False
        except (ValueError, ZeroDivisionError) as error:
            return f"error: {error}", 0.0, False

    def finish(self, answer: str) -> float:
        """Return 1 if the last number of the answer is right (to six decimals), else 0."""
        found = last_number(answer)
        return float(found is not None and abs(found - self._answer) <= Fraction(1, 10**6))


class PythonTests:
    """Small programs: the tool `python` runs code; the reward is the share of the row's `tests` that pass."""

    tools: ClassVar = [_schema("python", "Run a Python program and return what it prints.", "code", "The program.")]

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin with a row; its column `tests` is a list of statements such as `assert double(2) == 4`."""
        tests = row["tests"]
        self._tests = [str(test) for test in ([tests] if isinstance(tests, str) else tests)]
        if not self._tests:
            raise ValueError("column 'tests' is empty")

    def step(self, call: Any) -> tuple[str, float, bool]:
        """Run the code and return what it printed, errors included."""
        if call.name != "python":
            return f"error: there is no tool {call.name}", 0.0, False
        return run_program(str(call.arguments.get("code", "")))[1], 0.0, False

    def finish(self, answer: str) -> float:
        """Return the share of the tests that pass after the answer's last code block, or its whole text."""
        code = [answer, *_CODE.findall(answer)][-1]
        return sum(run_program(code, test)[0] for test in self._tests) / len(self._tests)


# Run the programs in one namespace; the secret shows that no `exit()` ended the process before the last line.
_HARNESS = """
import json, socket, sys
def refuse(*_, **__): raise OSError("there is no network")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
sys.modules["_socket"] = None
*programs, secret = json.load(sys.stdin)
names = {"__name__": "__main__"}
for program in programs: exec(compile(program, "program", "exec"), names)
print(secret, end="", flush=True)
"""


def run_program(*programs: str) -> tuple[bool, str]:
    """Run Python programs one after the other; return whether none had an error, and what they printed.

    They run in a process of their own in a temporary folder, without this process's environment variables, with limits
    on time, memory and files, and without a network. That stops accidents, not an attacker.
    """
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _HARNESS],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder},
            preexec_fn=_limit_resources,
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps([*programs, secret]).encode(), timeout=_PROGRAM_SECONDS)
        except subprocess.TimeoutExpired:
            return False, f"error: the program took longer than {_PROGRAM_SECONDS} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read(_PROGRAM_FILE).decode(errors="replace")
    passed = process.returncode == 0 and text.endswith(secret)
    if passed:
        return True, text.removesuffix(secret)
    printed, _, error = text.partition("Traceback (most recent call last)")
    last = (error.strip().splitlines() or [f"the program ended with code {process.returncode}"])[-1]
    return False, f"{printed}error: {last}"


def _limit_resources() -> None:
    """Limit the process before its program starts; where the kernel allows it, take the network away."""
    if sys.platform.startswith("linux"):
        new_user, new_network = 0x10000000, 0x40000000
        ctypes.CDLL(None).unshare(new_user | new_network)
    limits = {"CPU": _PROGRAM_SECONDS, "AS": _PROGRAM_MEMORY, "FSIZE": _PROGRAM_FILE, "CORE": 0, "NPROC": 0}
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (most, most))
