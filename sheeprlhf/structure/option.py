"""Definition of a configuration option: a dataclass field with its meaning, unit, choices and range.

`--help`, `show`, the validation and the documentation all read this metadata, so each fact is written once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

MISSING: Any = "???"  # OmegaConf's mark of a value that the user must give; a constant here, as its import is slow


def option(
    default: Any = dataclasses.MISSING,  # `MISSING` for one that the user must give
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

    Hydra cannot merge into dataclasses that are `frozen=True`. Comparison, hash and text are here, once for all
    dataclasses, which are therefore `eq=False, repr=False`: Python compiles these methods for each one otherwise, which
    takes a tenth of the time of a short command. An instance needs its hash to be another dataclass's default value.
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

    def __eq__(self, other: object) -> bool:
        """Compare the options of two configurations of one class."""
        return self._values() == other._values() if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        """A hash of all options."""
        return hash(tuple(tuple(v) if isinstance(v, list) else v for v in self._values().values()))

    def __repr__(self) -> str:
        """The call that makes this configuration, as of other dataclasses."""
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _values(self) -> dict[str, Any]:
        """The options of a dataclass by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self))}
