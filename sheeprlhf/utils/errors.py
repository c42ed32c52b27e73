"""Every error that a user can cause: one message that names the key, the value and the fix, and an exit code.

The command line prints the message of a `SheepError` and no traceback (`debug=true` shows it). Each class also has a
standard-library parent, so that library users can catch what they expect, and survives pickling between processes.
"""

from collections.abc import Callable, Sequence

Notify = Callable[[str], None]  # shows the user one line that is not an error

USERS_MISTAKE = 2  # an exit code, that of argparse and of shells: nothing was begun


class SheepError(Exception):
    """Base of the errors whose message is meant for the user. `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(SheepError, ValueError):
    """The configuration cannot work: key, value and fix of every problem."""

    exit_code = USERS_MISTAKE

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        """The problems, one a line."""
        return "\n".join(self.problems)


class UnsafePathError(ConfigError):
    """A path below a run or another folder is a symbolic link or not a plain file: nothing is written through it."""


class DataError(SheepError, ValueError):
    """The data cannot be used: names file, row and column, and the fix."""

    exit_code = USERS_MISTAKE


class ModelError(SheepError, ValueError):
    """The model cannot be loaded or used as asked."""

    exit_code = USERS_MISTAKE


class RunInUseError(SheepError, RuntimeError):
    """Another process holds the run directory's lock."""

    exit_code = USERS_MISTAKE


class CheckpointError(SheepError, RuntimeError):
    """A checkpoint is missing, damaged or of another run."""


class RecordError(SheepError, ValueError):
    """One of our own JSON files is damaged at `field` (empty: all of it); `problem` and `fix` end the sentence."""

    exit_code = USERS_MISTAKE

    def __init__(self, file: str, field: str, problem: str, fix: str) -> None:
        super().__init__(file, field, problem, fix)
        self.file, self.field, self.problem, self.fix = file, field, problem, fix

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.what()}; {self.fix}"

    def what(self) -> str:
        """File, field and problem without the fix."""
        where = f": field {self.field}" if self.field else ": it"
        return f"{self.file} is damaged{where} {self.problem}"


class DiskFullError(SheepError, RuntimeError):
    """The disk of the run directory is full: names the folder and the free space."""


class MissingRanksError(SheepError, RuntimeError):
    """Processes of the run did not start, ended or cannot be reached; names their ranks. Every rank raises it."""


class NonFiniteError(SheepError, ArithmeticError):
    """A loss or gradient is not finite. All ranks raise it together, before any weight changes."""


class RewardError(SheepError, RuntimeError):
    """A reward function raised, or did not return one finite number a response: names the function and the text."""


class RolloutServerError(SheepError, RuntimeError):
    """A rollout server fails; the weights are as they were after the last step."""


class RolloutMismatchError(RolloutServerError):
    """A rollout server computes other log-probabilities than the trainer."""

    exit_code = USERS_MISTAKE


class OutOfMemory(SheepError, MemoryError):
    """Memory ran out in `phase`: "forward pass", ...; `facts` may be empty, `advice` has one sentence each."""

    def __init__(self, phase: str, facts: str = "", *advice: str) -> None:
        super().__init__(phase, facts, *advice)
        self.phase, self.facts, self.advice = phase, facts, advice

    def __str__(self) -> str:
        """The phase that ran out of memory, and the advice, one sentence per line."""
        return "\n".join([f"out of memory: {self.phase}" + (f" ({self.facts})" if self.facts else ""), *self.advice])


class Interrupted(SheepError):
    """A signal stopped a job: training at a step's end, where the state is saved; elsewhere with `saved` False."""

    def __init__(self, signum: int, saved: bool = True) -> None:
        super().__init__(signum, saved)
        self.signum, self.saved = signum, saved
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        """One line for the user."""
        state = "the state is saved" if self.saved else "a training continues from its last checkpoint, if it has one"
        return f"stopped by signal {self.signum}; {state}"


def first_of(texts: Sequence[str], most: int, between: str = ", ") -> str:
    """The first texts of a list, for a message, and the number of the others: "a, b and 3 more"."""
    return between.join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
