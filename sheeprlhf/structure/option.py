"""Definition of a configuration option: a dataclass field with its meaning, unit, choices and range.

`--help`, `show`, the validation and the documentation all read this metadata, so each fact is written once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar


def option(
    default: Any = dataclasses.MISSING,  # `omegaconf.MISSING` ("???") for one that the user must give
    help: str = "",  # the meaning, one sentence
    *,
    factory: Callable[[], Any] | None = None,  # makes the default, for lists
    unit: str = "",  # of a number, for example "optimizer steps"
    choices: tuple[str, ...] = (),  # of a text, in any letter case; the first spelling is stored
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,  # the number must be greater than this
) -> Any:
    """A dataclass field with its documentation and limits."""
    metadata = dict(help=help, unit=unit, choices=choices, minimum=minimum, maximum=maximum, above=above)
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Config:
    """Parent of every configuration dataclass: attributes can be set until `lock` is called, then never.

    Hydra cannot merge into dataclasses that are `frozen=True`. The dataclasses below are
    `unsafe_hash=True` so that an instance can be another dataclass's default value on Python 3.11.
    """

    _locked: ClassVar[bool] = False

    def lock(self) -> None:
        """Make this configuration and those inside it read-only."""
        for value in vars(self).values():
            if isinstance(value, Config):
                value.lock()
        object.__setattr__(self, "_locked", True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse assignments once locked."""
        if self._locked:
            raise AttributeError(f"the configuration is read-only: {type(self).__name__}.{name} cannot be set")
        object.__setattr__(self, name, value)
